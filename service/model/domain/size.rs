//! Amounts of memory: a number and its unit.

use super::part::{Flat, Part};
use crate::xml::{Element, Finding, Node};

/// An amount of memory: an element with a number and a `unit`. Kept in KiB, rounded up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kib(pub u64);

impl Kib {
    /// Takes number and `unit` out of an element; what is wrong is reported, and then it is 0.
    pub fn take(at: &mut Element, log: &mut Vec<Finding>) -> Kib {
        let unit = at.take_attr("unit");
        let text = at.text();
        at.nodes.retain(|node| node.as_text().is_none());
        match scaled(&text, unit.as_ref().map_or("KiB", |u| &u.value)) {
            Ok(bytes) => Kib(bytes.div_ceil(1024) as u64),
            Err(expected) => {
                log.push(Finding::invalid(&at.at, expected));
                Kib(0)
            }
        }
    }

    /// Adds number and `unit` to an element.
    pub fn put(self, to: &mut Element) {
        to.set_attr("unit", "KiB");
        to.nodes.push(Node::Text(self.0.to_string()));
    }
}

impl Part for Kib {
    fn read(mut at: Element, log: &mut Vec<Finding>) -> Kib {
        Kib::take(&mut at, log)
    }

    fn write(&self, name: &str) -> Element {
        let mut element = Element::new(name);
        self.put(&mut element);
        element
    }
}

impl Flat for Kib {
    fn take(at: &mut Element, log: &mut Vec<Finding>) -> Kib {
        Kib::take(at, log)
    }

    fn put(&self, to: &mut Element) {
        Kib::put(*self, to);
    }
}

/// Bytes of `number` in `unit`; the error is a sentence.
pub(crate) fn scaled(number: &str, unit: &str) -> Result<u128, String> {
    let number: u64 = number.trim().parse().map_err(|_| format!("'{}' is not an amount of memory", number.trim()))?;
    let factor = factor(unit).ok_or_else(|| {
        format!("'{unit}' is not a unit of memory: b, bytes, KB, k, KiB, MB, M, MiB, GB, G, GiB, TB, T, TiB, PB, P, PiB, EB, E, EiB")
    })?;
    let bytes = u128::from(number) * factor;
    if bytes / 1024 > u128::from(u64::MAX / 1024) {
        Err(format!("{number} {unit} is more than can be counted"))
    } else {
        Ok(bytes)
    }
}

fn factor(unit: &str) -> Option<u128> {
    let lower = unit.to_ascii_lowercase();
    if matches!(&*lower, "b" | "byte" | "bytes") {
        return Some(1);
    }
    let power = "kmgtpe".find(lower.chars().next()?)? as u32 + 1;
    match &lower[1..] {
        "" | "ib" => Some(1024u128.pow(power)),
        "b" => Some(1000u128.pow(power)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kib(number: &str, unit: &str) -> Result<u64, String> {
        let mut log = Vec::new();
        let size = Kib::read(Element::new("memory").with_attr("unit", unit).with_text(number), &mut log);
        log.pop().map_or(Ok(size.0), |finding| Err(finding.message))
    }

    #[test]
    fn units_of_memory() {
        let cases =
            [("b", 4), ("bytes", 4), ("KB", 4000), ("k", 4096), ("KiB", 4096), ("MB", 4_000_000), ("M", 4 << 20)];
        for (unit, bytes) in cases {
            assert_eq!(kib("4", unit), Ok(u64::div_ceil(bytes, 1024)), "{unit}");
        }
        assert_eq!(kib(" 1\n", "GiB"), Ok(1 << 20));
        assert_eq!(kib("1", "TB"), Ok(976_562_500));
        assert_eq!(kib("1025", "b"), Ok(2), "rounded up");
        for (number, unit) in
            [("12x", "KiB"), ("-1", "KiB"), ("", "KiB"), ("1", "kilo"), ("1", "é"), ("18446744073709551615", "EiB")]
        {
            assert!(kib(number, unit).is_err(), "{number} {unit}");
        }
    }
}
