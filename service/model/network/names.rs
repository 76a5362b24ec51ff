//! Texts that end in the configuration of a server: what may stand there at all.

/// Whether a text can be the name of a host or of a domain.
pub fn is_host_name(text: &str) -> bool {
    let is_label = |label: &str| {
        let fits = (1..=63).contains(&label.len()) && !label.starts_with('-');
        fits && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    text.len() <= 253 && text.strip_suffix('.').unwrap_or(text).split('.').all(is_label)
}

/// Whether dnsmasq takes the name of a host, as it stands among the words of a reservation, for something else: for how long an
/// address is given, for an address, or for a word of its own.
pub(super) fn is_word_of_reservations(text: &str) -> bool {
    let number = text.strip_suffix(|c: char| "smhdwSMHDW".contains(c)).unwrap_or(text);
    let is_time = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let is_address = !text.bytes().any(|byte| byte.is_ascii_alphabetic());
    is_time || is_address || ["ignore", "infinite"].iter().any(|word| text.eq_ignore_ascii_case(word))
}

/// Whether a text can be the name of a network device.
pub(super) fn is_device(text: &str) -> bool {
    let plain =
        |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%' | b'"' | b'\\' | b',' | b'*' | b'#');
    (1..=15).contains(&text.len()) && !matches!(text, "." | "..") && text.bytes().all(plain)
}

/// Whether a text can be the identifier of a guest in IPv6: pairs of hexadecimal digits.
pub(super) fn is_duid(text: &str) -> bool {
    let pairs: Vec<&str> = text.split(':').collect();
    let is_pair = |pair: &&str| matches!(pair.len(), 1 | 2) && pair.bytes().all(|byte| byte.is_ascii_hexdigit());
    (2..=130).contains(&pairs.len()) && pairs.iter().all(is_pair)
}

/// Whether a text stands on one line and is plain: no control characters.
pub(super) fn is_line(text: &str) -> bool {
    !text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_can_be_ones() {
        for yes in ["a", "web-1.example.com", "_ldap", "example.com.", "10"] {
            assert!(is_host_name(yes), "{yes}");
        }
        for no in ["", ".", "a..b", "-a", "a b", "a,b", "a\nb", "a/b", "a#b", &"a".repeat(64), &"a.".repeat(127)] {
            assert!(!is_host_name(no), "{no}");
        }
        for taken in ["ignore", "Infinite", "10", "45m", "7W", "10.0.0.9", "1-2"] {
            assert!(is_host_name(taken) && is_word_of_reservations(taken), "{taken}");
        }
        for free in ["m", "m45", "4x5m", "ignored", "10.example.com", "web-1"] {
            assert!(!is_word_of_reservations(free), "{free}");
        }
        for yes in ["virbr0", "br-lan.7", "eth0@x"] {
            assert!(is_device(yes), "{yes}");
        }
        for no in ["", "a/b", "..", "sixteen-letters-", "a b", "a\n", "br*", "vnet%d", "é"] {
            assert!(!is_device(no), "{no}");
        }
        assert!(is_duid("0:1:0:1:18:aa:62:fe:0:16:3e:44:55:66") && !is_duid("0:1,2") && !is_duid("7"));
    }
}
