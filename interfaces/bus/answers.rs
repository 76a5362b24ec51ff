//! The standard interfaces: Peer, Introspectable, Properties and ObjectManager, answered from the rows.

use super::call::encoded_reply;
use super::rows::Objects;
use super::table::Table;
use super::wire::{Body, Extent, Row};
use crate::error::Error;
use std::fmt::Write as _;
use std::sync::OnceLock;
use zbus::Message;

/// The object that manages the others.
pub const ROOT: &str = "/org/virt";

/// Larger answers are refused: a bus carries 32 MiB, and throws out whoever sends more.
pub const LARGEST: usize = 24 << 20;

const DOCTYPE: &str = "<!DOCTYPE node PUBLIC \"-//freedesktop//DTD D-BUS Object Introspection 1.0//EN\"\n \
                       \"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd\">\n";

/// Properties.Get
pub fn get(call: &Message, objects: &Objects, path: &str) -> Result<Message, Error> {
    let body = call.body();
    let (interface, property): (&str, &str) = arguments(body.deserialize())?;
    let row = row(objects, path, interface)?;
    let value = row.variant(property).ok_or_else(|| unknown_property(interface, property))?;
    encoded_reply(&call.header(), "v", &value)
}

/// Properties.GetAll
pub fn get_all(call: &Message, objects: &Objects, path: &str) -> Result<Message, Error> {
    let body = call.body();
    let interface: &str = arguments(body.deserialize())?;
    // An empty name means every interface; the standard ones have no properties.
    let rows = match interface {
        "" => objects.get(path).ok_or_else(|| no_object(path))?.parts().map(|(_, row)| row).collect(),
        _ if is_standard(interface) => Vec::new(),
        _ => vec![row(objects, path, interface)?],
    };
    let mut all = Body::with_capacity(2048);
    all.array(8, |body| rows.iter().for_each(|row| row.entries(Extent::Whole, body)));
    fits(all.bytes().len())?;
    encoded_reply(&call.header(), "a{sv}", &all)
}

/// ObjectManager.GetManagedObjects. Where they are too many for one answer with all that they have, it has no long properties.
pub fn managed_objects(call: &Message, objects: &Objects) -> Result<Message, Error> {
    let mut all = listed(objects, Extent::Whole);
    if all.bytes().len() > LARGEST {
        all = listed(objects, Extent::Short);
    }
    fits(all.bytes().len())?;
    encoded_reply(&call.header(), "a{oa{sa{sv}}}", &all)
}

/// All objects, as long as they fit: the one that does not is the last.
fn listed(objects: &Objects, extent: Extent) -> Body {
    let mut all = Body::default();
    all.array(8, |body| {
        for object in objects.below(ROOT) {
            if body.bytes().len() > LARGEST {
                break;
            }
            body.align(8);
            body.text(&object.path);
            object.interfaces(extent, body);
        }
    });
    all
}

/// Introspectable.Introspect: what the object has, and the names of its children.
pub fn introspect(call: &Message, objects: &Objects, table: &Table, path: &str) -> Result<Message, Error> {
    let mut xml = format!("{DOCTYPE}<node>\n");
    let object = objects.get(path);
    let own = object.into_iter().flat_map(|object| object.parts()).map(|(interface, _)| interface);
    let manager = (path == ROOT).then_some("org.freedesktop.DBus.ObjectManager");
    let properties = object.map(|_| "org.freedesktop.DBus.Properties");
    let every = ["org.freedesktop.DBus.Introspectable", "org.freedesktop.DBus.Peer"];
    for name in own.chain(manager).chain(properties).chain(every) {
        xml.push_str(table.get(name).map_or("", |interface| &interface.xml));
    }
    for child in objects.children(path) {
        let _ = writeln!(xml, "  <node name=\"{child}\"/>");
    }
    xml.push_str("</node>\n");
    let mut body = Body::with_capacity(xml.len() + 5);
    body.text(&xml);
    fits(body.bytes().len())?;
    encoded_reply(&call.header(), "s", &body)
}

/// Peer.GetMachineId
#[allow(clippy::disallowed_methods, reason = "files of this host that every program reads")]
pub fn machine_id(call: &Message) -> Result<Message, Error> {
    static ID: OnceLock<String> = OnceLock::new();
    let id = ID.get_or_init(|| {
        let files = ["/etc/machine-id", "/var/lib/dbus/machine-id"].iter();
        files.filter_map(|file| std::fs::read_to_string(file).ok()).next().unwrap_or_default().trim().to_owned()
    });
    if id.is_empty() {
        return Err(Error::failed("this machine has no id; systemd-machine-id-setup or dbus-uuidgen makes one"));
    }
    let mut body = Body::default();
    body.text(id);
    encoded_reply(&call.header(), "s", &body)
}

/// Peer.Ping
pub fn ping(call: &Message) -> Result<Message, Error> {
    encoded_reply(&call.header(), "", &Body::default())
}

/// Whether an answer of this size can be sent.
pub fn fits(size: usize) -> Result<(), Error> {
    if size <= LARGEST {
        return Ok(());
    }
    Err(Error::limits(format!("the answer would have {size} bytes, and no more than {LARGEST} are sent; ask for less")))
}

/// Whether an interface is one of the bus's own.
pub fn is_standard(interface: &str) -> bool {
    let name = interface.strip_prefix("org.freedesktop.DBus.");
    name.is_some_and(|name| matches!(name, "Peer" | "Introspectable" | "Properties" | "ObjectManager"))
}

/// There is nothing at this path.
pub fn no_object(path: &str) -> Error {
    Error::unknown_object(format!("there is no object {path}"))
}

/// The interface has no such property.
pub fn unknown_property(interface: &str, property: &str) -> Error {
    Error::unknown_property(format!("{interface} has no property '{property}'"))
}

fn row<'a>(objects: &'a Objects, path: &str, interface: &str) -> Result<&'a Row, Error> {
    let object = objects.get(path).ok_or_else(|| no_object(path))?;
    let row = object.row_of(interface);
    row.ok_or_else(|| Error::unknown_interface(format!("{path} has no interface '{interface}' with properties")))
}

fn arguments<T>(read: zbus::Result<T>) -> Result<T, Error> {
    read.map_err(|error| Error::invalid_args(format!("the arguments cannot be read: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::rows::Object;
    use crate::bus::wire::{Long, Value};
    use std::collections::HashMap;
    use std::sync::Arc;
    use zbus::{OwnedObjectPath, OwnedVariant};

    #[derive(Debug)]
    struct Large;

    impl Long for Large {
        fn put(&self, _: &str, body: &mut Body) {
            body.text(&"x".repeat(1 << 20));
        }
    }

    /// The properties of each object that are listed, of so many.
    fn listed_of(count: usize) -> Vec<Vec<String>> {
        let mut objects = Objects::default();
        for number in 0..count {
            let row = Row::with_long(&[("Count", "u"), ("Text", "s")], &[Value::U32(1)], Arc::new(Large));
            let path = format!("/org/virt/domain/_{number}");
            objects.put(Object::new(path, "org.virt.Domain", row));
        }
        let call = Message::method_call("/org/virt", "GetManagedObjects").build(&()).unwrap();
        let answer = managed_objects(&call, &objects).unwrap();
        type Interfaces = HashMap<String, HashMap<String, OwnedVariant>>;
        let all: HashMap<OwnedObjectPath, Interfaces> = answer.body().deserialize().unwrap();
        let names = |interfaces: Interfaces| interfaces.into_values().flat_map(HashMap::into_keys).collect();
        all.into_values()
            .map(names)
            .map(|mut names: Vec<String>| {
                names.sort();
                names
            })
            .collect()
    }

    #[test]
    fn what_is_long_is_left_out_of_a_listing_that_would_be_too_large() {
        assert_eq!(listed_of(2), vec![vec!["Count", "Text"]; 2]);
        assert_eq!(listed_of(LARGEST >> 20), vec![vec!["Count"]; LARGEST >> 20]);
    }
}
