//! How arguments are written: JSON where QEMU takes it, `key=value` lists with commas doubled where it does not.

use serde_json::Value;
use std::fmt::Write;

/// The argument vector as it grows.
#[derive(Debug, Default)]
pub struct Args(Vec<String>);

impl Args {
    /// `-name value`
    pub fn pair(&mut self, option: &str, value: impl Into<String>) {
        self.0.push(option.to_owned());
        self.0.push(value.into());
    }

    /// An option that stands alone.
    pub fn flag(&mut self, option: &str) {
        self.0.push(option.to_owned());
    }

    /// Adds arguments as they are.
    pub fn verbatim(&mut self, arguments: impl IntoIterator<Item = String>) {
        self.0.extend(arguments);
    }

    /// `-device {…}`
    pub fn device(&mut self, props: Props) {
        self.pair("-device", props.to_string());
    }

    /// `-object {…}`
    pub fn object(&mut self, props: Props) {
        self.pair("-object", props.to_string());
    }

    /// `-blockdev {…}`
    pub fn blockdev(&mut self, props: Props) {
        self.pair("-blockdev", props.to_string());
    }

    /// How many words there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes out an option with its values, which are JSON, where it stands behind the first `from` words; gives the values in
    /// order.
    pub fn take(&mut self, option: &str, from: usize) -> Vec<Value> {
        let mut rest = self.0.split_off(from.min(self.0.len())).into_iter();
        let mut taken = Vec::new();
        while let Some(word) = rest.next() {
            match word == option {
                true => taken.extend(rest.next().and_then(|json| serde_json::from_str(&json).ok())),
                false => self.0.push(word),
            }
        }
        taken
    }

    /// What has been written of an option whose values are JSON, in order.
    pub fn json_of(&self, option: &str) -> Vec<Value> {
        let pairs = self.0.iter().zip(self.0.iter().skip(1)).filter(|(before, _)| *before == option);
        pairs.filter_map(|(_, json)| serde_json::from_str(json).ok()).collect()
    }

    /// What has been written.
    pub fn into_vec(self) -> Vec<String> {
        self.0
    }
}

/// A JSON object whose keys keep the order in which they were set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Props(Vec<(String, Value)>);

impl Props {
    /// Begins with one member, usually what kind of thing it is.
    pub fn new(key: &str, value: impl Into<Value>) -> Self {
        Props::default().set(key, value)
    }

    /// Of a device: begins with its type.
    pub fn device(driver: &str) -> Self {
        Props::new("driver", driver)
    }

    /// Adds a member.
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.0.push((key.to_owned(), value.into()));
        self
    }

    /// Adds a member if there is a value.
    pub fn maybe(self, key: &str, value: Option<impl Into<Value>>) -> Self {
        match value {
            Some(value) => self.set(key, value),
            None => self,
        }
    }

    /// Adds a member that is on or off, if it is said; QEMU's `OnOffAuto` properties take words.
    pub fn maybe_on_off(self, key: &str, value: Option<bool>) -> Self {
        self.maybe(key, value.map(on_off))
    }

    /// Adds all of another's members.
    pub fn extend(mut self, other: Props) -> Self {
        self.0.extend(other.0);
        self
    }
}

impl From<Props> for Value {
    fn from(props: Props) -> Value {
        Value::Object(props.0.into_iter().collect())
    }
}

impl std::fmt::Display for Props {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_char('{')?;
        for (n, (key, value)) in self.0.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            write!(f, "{comma}{}:{value}", Value::from(key.as_str()))?;
        }
        f.write_char('}')
    }
}

/// A `first,key=value,…` list, commas in values doubled.
#[derive(Clone, Debug, Default)]
pub struct List(String);

impl List {
    /// Begins with a bare word.
    pub fn new(first: impl AsRef<str>) -> Self {
        List(escape(first.as_ref()))
    }

    /// Adds `key=value`.
    pub fn set(mut self, key: &str, value: impl std::fmt::Display) -> Self {
        let comma = if self.0.is_empty() { "" } else { "," };
        _ = write!(self.0, "{comma}{key}={}", escape(&value.to_string()));
        self
    }

    /// Adds `key=value` if there is a value.
    pub fn maybe(self, key: &str, value: Option<impl std::fmt::Display>) -> Self {
        match value {
            Some(value) => self.set(key, value),
            None => self,
        }
    }

    /// Adds `key=on` or `key=off`, if it is said.
    pub fn maybe_on_off(self, key: &str, value: Option<bool>) -> Self {
        self.maybe(key, value.map(on_off))
    }
}

impl From<List> for String {
    fn from(list: List) -> String {
        list.0
    }
}

/// QEMU's words for truth.
pub fn on_off(value: bool) -> &'static str {
    if value { "on" } else { "off" }
}

fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept_and_commas_are_doubled() {
        let props =
            Props::device("x").set("b", 1).set("a", "q\"t").maybe("c", None::<bool>).maybe_on_off("d", Some(true));
        assert_eq!(props.to_string(), r#"{"driver":"x","b":1,"a":"q\"t","d":"on"}"#);
        let list: String = List::new("socket").set("path", "/a,b").maybe("id", Some("c")).into();
        assert_eq!(list, "socket,path=/a,,b,id=c");
        assert_eq!(String::from(List::default().set("guest", "a,b")), "guest=a,,b");
    }
}
