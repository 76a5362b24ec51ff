//! Base64, in which agents and QEMU's monitor are given bytes, and agents give them.

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Bytes as text.
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let number = three.iter().fold(0u32, |number, byte| number << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for place in 0..4 {
            let digit = DIGITS[(number >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= three.len() { digit as char } else { '=' });
        }
    }
    text
}

/// The first `most` bytes of a text, and whether those are all. `None`: it is no base64.
pub fn decode(text: &str, most: usize) -> Option<(Vec<u8>, bool)> {
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let digits = text.strip_suffix("==").or_else(|| text.strip_suffix('=')).unwrap_or(text).as_bytes();
    let all = digits.len() * 3 / 4;
    let mut bytes = Vec::with_capacity(all.min(most));
    for four in digits.chunks(4) {
        let number = four.iter().try_fold(0u32, |number, digit| Some(number << 6 | value(*digit)?))?;
        let three = (number << (6 * (4 - four.len()))).to_be_bytes();
        let left = most - bytes.len();
        bytes.extend_from_slice(&three[1..four.len()][..left.min(four.len() - 1)]);
    }
    Some((bytes, all <= most))
}

fn value(digit: u8) -> Option<u32> {
    let (from, first) = match digit {
        b'A'..=b'Z' => (b'A', 0),
        b'a'..=b'z' => (b'a', 26),
        b'0'..=b'9' => (b'0', 52),
        b'+' => (b'+', 62),
        b'/' => (b'/', 63),
        _ => return None,
    };
    Some(u32::from(digit - from) + first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_that_of_the_standard() {
        let texts = ["", "f", "fo", "foo", "foob", "fooba", "foobar", "\u{ff}"];
        let all = texts.map(|text| encode(text.as_bytes()));
        assert_eq!(all, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy", "w78="]);
        assert_eq!(encode(&[0xfb, 0xff, 0xfe]), "+//+");
        for (text, said) in texts.iter().zip(&all) {
            assert_eq!(decode(said, 8), Some((text.as_bytes().to_vec(), true)));
        }
    }

    #[test]
    fn what_is_none_is_not_read_and_no_more_than_is_wanted() {
        for none in ["Z", "Zg=", "Zg", "Z===", "====", "Zm9v\n", "Zm9v ===", "Zm-v", "Z=9v", "Zg==Zg=="] {
            assert_eq!(decode(none, 8), None, "{none}");
        }
        let foobar = |most| decode("Zm9vYmFy", most).unwrap();
        assert_eq!((foobar(6), foobar(4)), ((b"foobar".to_vec(), true), (b"foob".to_vec(), false)));
        assert_eq!((foobar(3), foobar(0)), ((b"foo".to_vec(), false), (Vec::new(), false)));
    }
}
