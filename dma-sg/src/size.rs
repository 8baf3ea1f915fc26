//! Sizes in a readable form.

use std::fmt;

/// A number of bytes whose `Display` is "4 GiB", "1.5 MiB" or "37 bytes".
///
/// A size that is not whole in its unit has one decimal: "6 GiB" is exact, "6.0 GiB" is rounded down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = (self.0.max(1).ilog2() / 10) as usize;
        let name = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][unit];
        let one = 1_u64 << (10 * unit);
        if self.0.is_multiple_of(one) {
            write!(f, "{} {name}", self.0 / one)
        } else {
            // Rounded down, so that a little less than 2 GiB does not read as 2 GiB.
            let tenths = (u128::from(self.0 % one) * 10 / u128::from(one)) as u8;
            write!(f, "{}.{tenths} {name}", self.0 / one)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_sizes_have_no_decimal() {
        let show = |bytes| Size(bytes).to_string();
        assert_eq!(show(0), "0 bytes");
        assert_eq!(show(1023), "1023 bytes");
        assert_eq!(show(1 << 10), "1 KiB");
        assert_eq!(show(3 << 19), "1.5 MiB");
        assert_eq!(show((2 << 30) - 1), "1.9 GiB");
        assert_eq!(show((6 << 30) + 1), "6.0 GiB");
        assert_eq!(show(u64::MAX), "15.9 EiB");
    }
}
