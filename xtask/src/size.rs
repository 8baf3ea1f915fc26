//! Sizes such as `512M`, `6G` and `4096`.

use std::fmt;
use std::str::FromStr;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    pub const fn mib(n: u64) -> Size {
        Size(n << 20)
    }

    pub const fn gib(n: u64) -> Size {
        Size(n << 30)
    }

    /// Whole MiB, rounded up, for QEMU's `-m`.
    pub fn as_mib(self) -> u64 {
        self.0.div_ceil(1 << 20)
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let wrong = || format!("`{text}` is not a size; write for example 512M or 6G");
        let upper = text.trim().to_ascii_uppercase();
        let short = upper.strip_suffix("IB").or(upper.strip_suffix('B')).unwrap_or(&upper);
        let (digits, shift) = match short.chars().last() {
            Some('K') => (&short[..short.len() - 1], 10),
            Some('M') => (&short[..short.len() - 1], 20),
            Some('G') => (&short[..short.len() - 1], 30),
            Some('T') => (&short[..short.len() - 1], 40),
            _ => (short, 0),
        };
        let number: u64 = digits.trim().parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).filter(|&n| n > 0).map(Size).ok_or_else(wrong)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in [("G", 30), ("M", 20), ("K", 10)] {
            if self.0 >= 1 << shift && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_and_print() {
        assert_eq!("512M".parse(), Ok(Size::mib(512)));
        assert_eq!("6G".parse(), Ok(Size::gib(6)));
        assert_eq!("6GiB".parse(), Ok(Size::gib(6)));
        assert_eq!("6 gb".parse(), Ok(Size::gib(6)));
        assert_eq!("4096".parse(), Ok(Size(4096)));
        assert_eq!(Size::gib(6).to_string(), "6G");
        assert_eq!(Size::mib(1536).to_string(), "1536M");
        assert_eq!(Size(4097).to_string(), "4097");
        assert_eq!(Size(4097).as_mib(), 1);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "G", "1.5G", "-1M", "0", "99999999999G", "1X"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
