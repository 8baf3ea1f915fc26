//! Sizes on the command line.

/// Parses a size in bytes, such as 4096, 512M or 4G.
pub fn parse_size(text: &str) -> Result<u64, String> {
    parse_offset(text).and_then(|size| if size > 0 { Ok(size) } else { Err("a size of 0".into()) })
}

/// Parses a number of bytes that may be 0.
pub fn parse_offset(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let size = digits.parse::<u64>().ok().and_then(|count| count.checked_mul(1 << shift));
    size.ok_or_else(|| "a size is a number with K, M or G, such as 512M".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_offset("0"), Ok(0));
        for wrong in ["", "M", "0", "4X", "99999999999G"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
