//! Characters and names as XML 1.0 has them, and the few references there are without a DTD.

/// Whether a document may hold this character at all.
pub(super) fn is_legal(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..='\u{10ffff}')
}

/// White space between tokens.
pub(super) fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

fn starts_name(c: char) -> bool {
    matches!(c, 'A'..='Z' | 'a'..='z' | '_' | '\u{c0}'..='\u{d6}' | '\u{d8}'..='\u{f6}' | '\u{f8}'..='\u{2ff}'
        | '\u{370}'..='\u{37d}' | '\u{37f}'..='\u{1fff}' | '\u{200c}'..='\u{200d}' | '\u{2070}'..='\u{218f}'
        | '\u{2c00}'..='\u{2fef}' | '\u{3001}'..='\u{d7ff}' | '\u{f900}'..='\u{fdcf}' | '\u{fdf0}'..='\u{fffd}'
        | '\u{10000}'..='\u{effff}')
}

fn continues_name(c: char) -> bool {
    starts_name(c) || matches!(c, '-' | '.' | '0'..='9' | '\u{b7}' | '\u{300}'..='\u{36f}' | '\u{203f}'..='\u{2040}')
}

/// A name without a colon.
pub(super) fn is_plain_name(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(starts_name) && chars.all(continues_name)
}

/// A name, perhaps with a prefix.
pub(super) fn is_name(name: &str) -> bool {
    match name.split_once(':') {
        Some((prefix, local)) => is_plain_name(prefix) && is_plain_name(local),
        None => is_plain_name(name),
    }
}

/// What `&…;` stands for; `reference` is what is between. There are no entities but XML's own five.
pub(super) fn resolve(reference: &str) -> Result<char, String> {
    let number = |digits: &str, radix| {
        let digit = |c: char| c.is_digit(radix);
        if digits.is_empty() || !digits.chars().all(digit) { None } else { u32::from_str_radix(digits, radix).ok() }
    };
    let code = match reference {
        "lt" => return Ok('<'),
        "gt" => return Ok('>'),
        "amp" => return Ok('&'),
        "apos" => return Ok('\''),
        "quot" => return Ok('"'),
        _ => match reference.strip_prefix("#x") {
            Some(hex) => number(hex, 16),
            None => reference.strip_prefix('#').and_then(|decimal| number(decimal, 10)),
        },
    };
    if code.is_none() && !reference.starts_with('#') {
        return Err(format!("the entity '{}' is not defined", super::shorten(reference)));
    }
    let character = code.and_then(char::from_u32).filter(|c| is_legal(*c));
    character.ok_or_else(|| format!("'&{};' is not a character", super::shorten(reference)))
}

/// Line ends as XML has them.
pub(super) fn normalise_lines(text: &str) -> String {
    if text.contains('\r') { text.replace("\r\n", "\n").replace('\r', "\n") } else { text.to_owned() }
}
