//! The encoded form of what is read often: property values, packed so that every answer is a few copies.
//!
//! A dictionary entry of `a{sv}` always begins at a multiple of eight bytes and so looks the same wherever it stands. A
//! row is those entries one after the other: `GetAll`, `GetManagedObjects` and `PropertiesChanged` copy them, a single
//! `Get` copies the value out of one. All is little-endian, and the messages say so.

use std::fmt::{Debug, Write as _};
use std::sync::Arc;

/// A property's value.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// `b`
    Bool(bool),
    /// `u`
    U32(u32),
    /// `i`
    I32(i32),
    /// `t`
    U64(u64),
    /// `d`
    F64(f64),
    /// `s`
    Str(&'a str),
    /// `o`; the caller vouches that it is a valid path.
    Path(&'a str),
    /// `as`
    Strs(&'a [&'a str]),
    /// `ao`; the caller vouches that they are valid paths.
    Paths(&'a [String]),
    /// `a(sss)`
    Triples(&'a [(String, &'static str, String)]),
    /// `a(ss)`
    Pairs(&'a [(&'static str, String)]),
    /// `a(oss)`: objects, where in them, and how; the caller vouches that the first are valid paths.
    Users(&'a [(String, &'a str, &'static str)]),
    /// `a{sa{sv}}`
    Tables(&'a [(&'a str, Vec<(&'static str, Value<'a>)>)]),
    /// `a(sss)`: reservations of a network.
    Hosts(&'a [(String, String, String)]),
    /// `a(ssso)`: leases of a network; the caller vouches that the last are valid paths.
    Leases(&'a [(&'a str, &'a str, &'a str, String)]),
}

/// The type of each kind of [`Value`], by its name.
#[allow(non_upper_case_globals, missing_docs, reason = "called as the variants are")]
pub mod kind {
    pub const Bool: &str = "b";
    pub const U32: &str = "u";
    pub const I32: &str = "i";
    pub const U64: &str = "t";
    pub const F64: &str = "d";
    pub const Str: &str = "s";
    pub const Path: &str = "o";
    pub const Strs: &str = "as";
    pub const Paths: &str = "ao";
    pub const Triples: &str = "a(sss)";
    pub const Pairs: &str = "a(ss)";
    pub const Users: &str = "a(oss)";
    pub const Tables: &str = "a{sa{sv}}";
    pub const Hosts: &str = "a(sss)";
    pub const Leases: &str = "a(ssso)";
}

impl Value<'_> {
    /// Its type.
    pub fn signature(&self) -> &'static str {
        match self {
            Value::Bool(_) => kind::Bool,
            Value::U32(_) => kind::U32,
            Value::I32(_) => kind::I32,
            Value::U64(_) => kind::U64,
            Value::F64(_) => kind::F64,
            Value::Str(_) => kind::Str,
            Value::Path(_) => kind::Path,
            Value::Strs(_) => kind::Strs,
            Value::Paths(_) => kind::Paths,
            Value::Triples(_) => kind::Triples,
            Value::Pairs(_) => kind::Pairs,
            Value::Users(_) => kind::Users,
            Value::Tables(_) => kind::Tables,
            Value::Hosts(_) => kind::Hosts,
            Value::Leases(_) => kind::Leases,
        }
    }

    fn alignment(&self) -> usize {
        if matches!(self, Value::U64(_) | Value::F64(_)) { 8 } else { 4 }
    }
}

/// Bytes of a message body in the making; its start is a multiple of eight in the message.
#[derive(Default, Debug)]
pub struct Body(Vec<u8>);

impl Body {
    /// An empty body with room for `size` bytes.
    pub fn with_capacity(size: usize) -> Body {
        Body(Vec::with_capacity(size))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Zeroes up to the next multiple of `alignment`.
    pub fn align(&mut self, alignment: usize) {
        let length = self.0.len().next_multiple_of(alignment);
        self.0.resize(length, 0);
    }

    /// An `u`.
    pub fn u32(&mut self, number: u32) {
        self.align(4);
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    /// An `s` or `o`. A zero within it would end the connection, whoever wrote it there: none is sent.
    pub fn text(&mut self, text: &str) {
        self.u32(text.len() as u32);
        let begin = self.0.len();
        self.0.extend_from_slice(text.as_bytes());
        self.0[begin..].iter_mut().filter(|byte| **byte == 0).for_each(|byte| *byte = b'?');
        self.0.push(0);
    }

    /// A `v`.
    pub fn variant(&mut self, value: &Value<'_>) {
        self.signature(value.signature());
        self.align(value.alignment());
        self.value(value);
    }

    /// Bytes encoded before, which began at a multiple of eight.
    pub fn aligned(&mut self, bytes: &[u8]) {
        self.align(8);
        self.0.extend_from_slice(bytes);
    }

    /// An array whose elements begin at a multiple of `alignment`, written by `fill`.
    pub fn array(&mut self, alignment: usize, fill: impl FnOnce(&mut Body)) {
        self.u32(0);
        let length_at = self.0.len() - 4;
        self.align(alignment);
        let start = self.0.len();
        fill(self);
        let length = (self.0.len() - start) as u32;
        self.0[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    }

    fn signature(&mut self, signature: &str) {
        self.0.push(signature.len() as u8);
        self.0.extend_from_slice(signature.as_bytes());
        self.0.push(0);
    }

    fn value(&mut self, value: &Value<'_>) {
        match *value {
            Value::Bool(flag) => self.u32(flag.into()),
            Value::U32(number) => self.u32(number),
            Value::I32(number) => self.u32(number.cast_unsigned()),
            Value::U64(number) => self.0.extend_from_slice(&number.to_le_bytes()),
            Value::F64(number) => self.0.extend_from_slice(&number.to_le_bytes()),
            Value::Str(text) | Value::Path(text) => self.text(text),
            Value::Strs(texts) => self.array(4, |body| texts.iter().for_each(|text| body.text(text))),
            Value::Paths(paths) => self.array(4, |body| paths.iter().for_each(|path| body.text(path))),
            Value::Triples(triples) => self.array(8, |body| {
                for (one, two, three) in triples {
                    body.align(8);
                    [one.as_str(), two, three.as_str()].into_iter().for_each(|text| body.text(text));
                }
            }),
            Value::Pairs(pairs) => self.array(8, |body| {
                for (one, two) in pairs {
                    body.align(8);
                    [one, two.as_str()].into_iter().for_each(|text| body.text(text));
                }
            }),
            Value::Tables(tables) => self.array(8, |body| {
                for (name, entries) in tables {
                    body.align(8);
                    body.text(name);
                    body.array(8, |body| {
                        for (key, value) in entries {
                            body.align(8);
                            body.text(key);
                            body.variant(value);
                        }
                    });
                }
            }),
            Value::Hosts(hosts) => self.array(8, |body| {
                for (mac, address, name) in hosts {
                    body.align(8);
                    [mac, address, name].into_iter().for_each(|text| body.text(text));
                }
            }),
            Value::Leases(leases) => self.array(8, |body| {
                for (mac, address, name, domain) in leases {
                    body.align(8);
                    [mac, address, name, domain.as_str()].into_iter().for_each(|text| body.text(text));
                }
            }),
            Value::Users(users) => self.array(8, |body| {
                for (object, place, how) in users {
                    body.align(8);
                    [object.as_str(), place, how].into_iter().for_each(|text| body.text(text));
                }
            }),
        }
    }
}

/// A property: its name and the type of its value.
pub type Field = (&'static str, &'static str);

/// Long properties, which are kept as the service keeps them, and encoded whenever they are read.
pub trait Long: Debug + Send + Sync {
    /// Writes the value of one of them.
    fn put(&self, property: &str, body: &mut Body);
}

/// Which properties of a row are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All.
    Whole,
    /// All but long ones.
    Short,
}

/// What is published of one object: all its properties, encoded but for long ones. Never changed, only replaced.
#[derive(Clone, Debug)]
pub struct Row {
    /// The encoded ones first.
    fields: &'static [Field],
    entries: Box<[u8]>,
    /// Where each entry ends.
    ends: Box<[u32]>,
    /// What the others are written of.
    long: Option<Arc<dyn Long>>,
}

impl Row {
    /// Encodes `values`, which are those of `fields` in the same order.
    pub fn new(fields: &'static [Field], values: &[Value<'_>]) -> Row {
        debug_assert!(fields.iter().map(|f| f.1).eq(values.iter().map(Value::signature)));
        let mut body = Body::with_capacity(48 * fields.len());
        let mut ends = Vec::with_capacity(fields.len());
        for ((name, _), value) in fields.iter().zip(values) {
            body.align(8);
            body.text(name);
            body.variant(value);
            ends.push(body.0.len() as u32);
        }
        Row { fields, entries: body.0.into(), ends: ends.into(), long: None }
    }

    /// The same with long properties: the fields for which there are no values.
    pub fn with_long(fields: &'static [Field], values: &[Value<'_>], long: Arc<dyn Long>) -> Row {
        let encoded = &fields[..values.len()];
        Row { fields, long: Some(long), ..Row::new(encoded, values) }
    }

    /// Its entries, as they stand in an `a{sv}`.
    pub fn entries(&self, extent: Extent, body: &mut Body) {
        body.aligned(&self.entries);
        if extent == Extent::Whole {
            (self.ends.len()..self.fields.len()).for_each(|index| self.long_entry(index, body));
        }
    }

    fn long_entry(&self, index: usize, body: &mut Body) {
        let (name, signature) = self.fields[index];
        body.align(8);
        body.text(name);
        body.signature(signature);
        self.long.iter().for_each(|long| long.put(name, body));
    }

    /// The body of an answer to `Get`: one `v`.
    pub fn variant(&self, name: &str) -> Option<Body> {
        let index = self.fields.iter().position(|field| field.0 == name)?;
        let (name, signature) = self.fields[index];
        if index >= self.ends.len() {
            let mut body = Body::default();
            body.signature(signature);
            self.long.iter().for_each(|long| long.put(name, &mut body));
            return Some(body);
        }
        let entry = self.entry(index);
        let value_at = 4 + name.len() + 1 + 1 + signature.len() + 1;
        let alignment = if matches!(signature, "t" | "d") { 8 } else { 4 };
        let mut body = Body::with_capacity(16 + entry.len());
        body.signature(signature);
        body.align(alignment);
        let value = value_at.next_multiple_of(alignment);
        if signature.starts_with("a(") {
            // Its elements begin at a multiple of eight, and so not at the same distance from its length everywhere.
            body.array(8, |body| body.0.extend_from_slice(&entry[(value + 4).next_multiple_of(8)..]));
        } else {
            body.0.extend_from_slice(&entry[value..]);
        }
        Some(body)
    }

    /// The entries of `self` that differ from those of `old`, as they stand in an `a{sv}`; empty if none does.
    pub fn changes(&self, old: &Row) -> Body {
        let mut body = Body::default();
        for index in 0..self.ends.len() {
            if self.entry(index) != old.entry(index) {
                body.aligned(self.entry(index));
            }
        }
        let same = self.long.as_ref().zip(old.long.as_ref()).is_none_or(|(new, old)| Arc::ptr_eq(new, old));
        for index in (self.ends.len()..self.fields.len()).filter(|_| !same) {
            let (mut new, mut before) = (Body::default(), Body::default());
            self.long_entry(index, &mut new);
            old.long_entry(index, &mut before);
            if new.bytes() != before.bytes() {
                body.aligned(new.bytes());
            }
        }
        body
    }

    fn entry(&self, index: usize) -> &[u8] {
        let start = if index == 0 { 0 } else { (self.ends[index - 1] as usize).next_multiple_of(8) };
        &self.entries[start..self.ends[index] as usize]
    }
}

/// `name` as an element of an object path: every byte outside `[A-Za-z0-9]`, and a digit at the start, is `_xx` in
/// hexadecimal; the empty name is `_`.
pub fn escape(name: &str) -> String {
    let mut label = String::with_capacity(name.len() + 8);
    for (index, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (byte.is_ascii_digit() && index > 0) {
            label.push(byte.into());
        } else {
            let _ = write!(label, "_{byte:02x}");
        }
    }
    if label.is_empty() { "_".to_owned() } else { label }
}

/// The name that [`escape`] made `label` of.
pub fn unescape(label: &str) -> Option<String> {
    if label == "_" {
        return Some(String::new());
    }
    let mut bytes = Vec::with_capacity(label.len());
    let mut rest = label.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'_' {
            bytes.push(*first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = after;
    }
    String::from_utf8(bytes).ok().filter(|name| escape(name) == label)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use zbus::wire::{LE, serialized::Context, serialized::Data};
    use zbus::{OwnedVariant, Variant};

    const FIELDS: &[Field] = &[
        ("Flag", "b"),
        ("Count", "u"),
        ("Size", "t"),
        ("Share", "d"),
        ("Name", "s"),
        ("At", "o"),
        ("Words", "as"),
        ("Ways", "ao"),
        ("Rows", "a(sss)"),
        ("None", "a(sss)"),
        ("Marks", "a(ss)"),
        ("Users", "a(oss)"),
    ];

    fn row(count: u32, name: &str) -> Row {
        let values = [
            Value::Bool(true),
            Value::U32(count),
            Value::U64(1 << 40),
            Value::F64(0.5),
            Value::Str(name),
            Value::Path("/org/virt"),
            Value::Strs(&["a", "", "ccc"]),
            Value::Paths(&["/a".to_owned(), "/b".to_owned()]),
            Value::Triples(&[("a".to_owned(), "bb", "ccc".to_owned()), (String::new(), "x", "y".to_owned())]),
            Value::Triples(&[]),
            Value::Pairs(&[("a", "b".to_owned()), ("", String::new())]),
            Value::Users(&[("/org".to_owned(), "vda", "live"), ("/".to_owned(), "", "foreign")]),
        ];
        Row::new(FIELDS, &values)
    }

    fn decode<T: zbus::Type + serde::de::DeserializeOwned>(bytes: &[u8]) -> T {
        let data = Data::new(bytes.to_vec(), Context::new(LE, 0));
        data.deserialize::<T>().expect("what we encode can be decoded").0
    }

    #[test]
    fn entries_read_back_as_a_dictionary() {
        let mut body = Body::default();
        body.array(8, |body| row(7, "web").entries(Extent::Whole, body));
        let all: HashMap<String, OwnedVariant> = decode(body.bytes());
        assert_eq!(all.len(), FIELDS.len());
        assert_eq!(*all["Flag"], Variant::from(true));
        assert_eq!(*all["Count"], Variant::from(7u32));
        assert_eq!(*all["Size"], Variant::from(1u64 << 40));
        assert_eq!(*all["Share"], Variant::from(0.5));
        assert_eq!(*all["Name"], Variant::from("web"));
        assert_eq!(*all["Words"], Variant::from(vec!["a", "", "ccc"]));
    }

    #[test]
    fn each_value_reads_back_alone() {
        let row = row(7, "web");
        for (name, signature) in FIELDS {
            let value: OwnedVariant = decode(row.variant(name).unwrap().bytes());
            assert_eq!(value.value_signature().to_string(), *signature, "{name}");
        }
        let rows: OwnedVariant = decode(row.variant("Rows").unwrap().bytes());
        assert_eq!(*rows, Variant::from(vec![("a", "bb", "ccc"), ("", "x", "y")]));
        let marks: OwnedVariant = decode(row.variant("Marks").unwrap().bytes());
        assert_eq!(*marks, Variant::from(vec![("a", "b"), ("", "")]));
        let users: OwnedVariant = decode(row.variant("Users").unwrap().bytes());
        let path = |path: &'static str| zbus::ObjectPath::try_from(path).unwrap();
        assert_eq!(*users, Variant::from(vec![(path("/org"), "vda", "live"), (path("/"), "", "foreign")]));
        let name: OwnedVariant = decode(row.variant("Name").unwrap().bytes());
        assert_eq!(*name, Variant::from("web"));
        assert!(row.variant("Other").is_none());
        let zero: OwnedVariant = decode(self::row(7, "a\0b").variant("Name").unwrap().bytes());
        assert_eq!(*zero, Variant::from("a?b"), "a message with a zero in a text would be none");
    }

    #[test]
    fn only_what_differs_is_a_change() {
        let (old, new) = (row(1, "web"), row(2, "longer name than before"));
        let mut body = Body::default();
        body.array(8, |body| body.aligned(new.changes(&old).bytes()));
        let changed: HashMap<String, OwnedVariant> = decode(body.bytes());
        let mut names: Vec<_> = changed.keys().map(String::as_str).collect();
        names.sort();
        assert_eq!(names, ["Count", "Name"]);
        assert!(new.changes(&new).bytes().is_empty());
    }

    #[derive(Debug)]
    struct Numbers(Vec<u32>);

    impl Long for Numbers {
        fn put(&self, property: &str, body: &mut Body) {
            match property {
                "Numbers" => body.array(4, |body| self.0.iter().for_each(|number| body.u32(*number))),
                _ => body.text("always"),
            }
        }
    }

    #[test]
    fn long_properties_read_as_all_others() {
        const FIELDS: &[Field] = &[("Count", "u"), ("Numbers", "au"), ("Other", "s")];
        let row =
            |count, numbers: &[u32]| Row::with_long(FIELDS, &[Value::U32(count)], Arc::new(Numbers(numbers.to_vec())));
        let read = |fill: &dyn Fn(&mut Body)| {
            let mut body = Body::default();
            body.array(8, |body| fill(body));
            let all: HashMap<String, OwnedVariant> = decode(body.bytes());
            let mut names: Vec<_> = all.into_iter().collect();
            names.sort_by(|one, other| one.0.cmp(&other.0));
            names
        };
        let (old, new) = (row(1, &[1]), row(2, &[1, 2]));
        let whole = read(&|body| new.entries(Extent::Whole, body));
        assert_eq!(whole.iter().map(|(name, _)| &**name).collect::<Vec<_>>(), ["Count", "Numbers", "Other"]);
        assert_eq!(*whole[1].1, Variant::from(vec![1_u32, 2]));
        assert_eq!(read(&|body| new.entries(Extent::Short, body)).len(), 1);
        let changed = read(&|body| body.aligned(new.changes(&old).bytes()));
        assert_eq!(changed, whole[..2]);
        assert!(new.changes(&row(2, &[1, 2])).bytes().is_empty() && new.changes(&new).bytes().is_empty());
        let one: OwnedVariant = decode(new.variant("Numbers").unwrap().bytes());
        assert_eq!(*one, Variant::from(vec![1_u32, 2]));
    }

    #[test]
    fn labels_are_escaped_as_systemd_does() {
        for (name, label) in [("", "_"), ("a1", "a1"), ("1a", "_31a"), ("a b_c", "a_20b_5fc"), ("é", "_c3_a9")] {
            assert_eq!(escape(name), label);
            assert_eq!(unescape(label).as_deref(), Some(name));
        }
    }
}
