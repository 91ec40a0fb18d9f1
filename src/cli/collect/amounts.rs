//! Amounts on the command line.

use std::str::FromStr;

/// A number of bytes, with `K`, `M`, `G` or `T` behind it for powers of 1024, as in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

/// A number of days, as Nix writes it: `30d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Days(pub u32);

/// Why a text is no amount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AmountError {
    /// It is no size.
    #[error("a size is a number of bytes, with K, M, G or T behind it for powers of 1024, such as 20G")]
    Size,
    /// It is no age.
    #[error("an age is a number of days with d behind it, such as 30d")]
    Age,
}

/// Digits and nothing else: `parse` takes a sign.
fn number<T: FromStr>(digits: &str) -> Option<T> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

impl FromStr for Bytes {
    type Err = AmountError;

    fn from_str(text: &str) -> Result<Self, AmountError> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let power = match &text[digits.len()..] {
            "" => 0,
            "K" => 1,
            "M" => 2,
            "G" => 3,
            "T" => 4,
            _ => return Err(AmountError::Size),
        };
        let bytes = number::<u64>(digits).and_then(|number| number.checked_mul(1 << (10 * power)));
        bytes.filter(|bytes| *bytes > 0).map(Self).ok_or(AmountError::Size)
    }
}

impl FromStr for Days {
    type Err = AmountError;

    fn from_str(text: &str) -> Result<Self, AmountError> {
        let days = text.strip_suffix('d').and_then(number::<u32>);
        // Nix counts back from now in seconds, in 32 bits.
        days.filter(|days| (1..=20_000).contains(days)).map(Self).ok_or(AmountError::Age)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts() {
        for (text, bytes) in [("1", 1), ("4096", 4096), ("20G", 20 << 30), ("007K", 7 << 10), ("2T", 2 << 40)] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "0", "0G", "G", "2GB", "2g", "-1", "+1", "1.5G", "20%", "1 G", "99999999T", "ä"] {
            assert_eq!(text.parse::<Bytes>(), Err(AmountError::Size), "{text:?}");
        }
        assert_eq!("30d".parse(), Ok(Days(30)));
        for text in ["", "d", "0d", "30", "30h", "-3d", "+3d", "1.5d", "30 d", "99999999d", "4294967296d"] {
            assert_eq!(text.parse::<Days>(), Err(AmountError::Age), "{text:?}");
        }
    }
}
