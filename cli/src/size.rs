//! Sizes on the command line.

/// Parses a size in bytes, such as 4096, 512M or 4G.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let size = digits.parse::<u64>().ok().and_then(|count| count.checked_mul(1 << shift));
    size.filter(|size| *size > 0).ok_or_else(|| "a size is a number with K, M or G, such as 512M".into())
}
