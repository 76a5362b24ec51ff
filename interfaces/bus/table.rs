//! The members there are: what the files in `data/interfaces/` say, compiled in.
//!
//! These files decide which call is accepted with which arguments, and their text is the answer to `Introspect`. A
//! member without a handler, or a handler without a member, stops virtd before it serves anybody.

use super::call::Handler;
use super::wire::Field;
use std::collections::HashMap;
use zbus::Signature;
use zbus_xml::ArgDirection;

/// The interfaces of virtd, as installed.
pub const FILES: &[&str] = &[
    include_str!("../../data/interfaces/org.virt.Manager.xml"),
    include_str!("../../data/interfaces/org.virt.Domain.xml"),
    include_str!("../../data/interfaces/org.virt.Snapshot.xml"),
    include_str!("../../data/interfaces/org.virt.Checkpoint.xml"),
    include_str!("../../data/interfaces/org.virt.Manager.Network.xml"),
    include_str!("../../data/interfaces/org.virt.Network.xml"),
    include_str!("../../data/interfaces/org.virt.Manager.Secret.xml"),
    include_str!("../../data/interfaces/org.virt.Secret.xml"),
    include_str!("../../data/interfaces/org.virt.Job.xml"),
    include_str!("../../data/interfaces/org.virt.Manager.NodeDevice.xml"),
    include_str!("../../data/interfaces/org.virt.NodeDevice.xml"),
    include_str!("../../data/interfaces/org.virt.Host.xml"),
    include_str!("../../data/interfaces/org.virt.Manager.Storage.xml"),
    include_str!("../../data/interfaces/org.virt.StoragePool.xml"),
    include_str!("../../data/interfaces/org.virt.StorageVolume.xml"),
    include_str!("../../data/interfaces/org.virt.StatsSubscription.xml"),
];

/// The interfaces that every object has, or every tree.
pub const STANDARD: &str = include_str!("standard.xml");

/// The annotation of methods whose options may give descriptors; the bus policy names the same ones.
const TAKES_FILES: &str = "org.virt.TakesDescriptors";

/// One interface.
#[derive(Debug)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its element in the introspection document.
    pub xml: String,
    /// Methods by name.
    pub methods: HashMap<String, Method>,
    /// Properties by name.
    pub properties: HashMap<String, Property>,
    /// Signals by name, with the types of their arguments.
    pub signals: HashMap<String, String>,
}

/// A method.
#[derive(Debug)]
pub struct Method {
    /// The types of what it takes.
    pub takes: Signature,
    /// The same as text, for messages.
    pub takes_text: String,
    /// Its options may give descriptors.
    pub takes_files: bool,
    /// Runs it; `None` for what the dispatcher answers itself.
    pub handler: Option<Handler>,
}

/// A property.
#[derive(Debug)]
pub struct Property {
    /// The type of its value.
    pub signature: String,
    /// Whether it can be set.
    pub writable: bool,
    /// Changes it; `None` for one that can only be read.
    pub setter: Option<Handler>,
}

/// What the code offers for one interface, to be held against its file.
#[derive(Debug)]
pub struct Offer {
    /// The interface.
    pub interface: &'static str,
    /// Its methods.
    pub methods: Vec<Handler>,
    /// Its writable properties.
    pub setters: Vec<Handler>,
    /// The properties in its rows.
    pub fields: &'static [Field],
    /// The signals it sends, with the types of their arguments.
    pub signals: &'static [Field],
}

/// All interfaces by name.
#[derive(Debug)]
pub struct Table(HashMap<String, Interface>);

impl Table {
    /// Reads the files and joins them with what the code offers. The error names the first thing that does not fit.
    pub fn new(offers: Vec<Offer>) -> Result<Table, String> {
        let mut interfaces = read(STANDARD)?;
        let mut own: HashMap<_, _> = HashMap::new();
        for file in FILES {
            own.extend(read(file)?);
        }
        for offer in offers {
            let interface = own.remove(offer.interface).ok_or(format!("{} has no file", offer.interface))?;
            interfaces.insert(interface.name.clone(), join(interface, offer)?);
        }
        match own.keys().next() {
            Some(name) => Err(format!("nothing is offered for {name}")),
            None => Ok(Table(interfaces)),
        }
    }

    /// One interface.
    pub fn get(&self, name: &str) -> Option<&Interface> {
        self.0.get(name)
    }

    /// Whether the options of a method may give descriptors.
    pub fn takes_files(&self, interface: &str, method: &str) -> bool {
        self.get(interface).and_then(|interface| interface.methods.get(method)).is_some_and(|method| method.takes_files)
    }
}

/// Puts handlers in their places.
fn join(mut interface: Interface, offer: Offer) -> Result<Interface, String> {
    let name = interface.name.clone();
    for handler in offer.methods {
        let member = handler.member;
        let method = interface.methods.get_mut(member).ok_or(format!("{name}.{member} is not in its file"))?;
        method.handler = Some(handler);
    }
    for handler in offer.setters {
        let member = handler.member;
        let property = interface.properties.get_mut(member).ok_or(format!("{name}.{member} is not in its file"))?;
        property.setter = Some(handler);
    }
    if let Some((member, _)) = interface.methods.iter().find(|(_, method)| method.handler.is_none()) {
        return Err(format!("{name}.{member} has no handler"));
    }
    let properties = interface.properties.iter().map(|(name, p)| (name.as_str(), p.signature.as_str())).collect();
    same(&name, properties, offer.fields)?;
    same(&name, interface.signals.iter().map(|(name, s)| (name.as_str(), s.as_str())).collect(), offer.signals)?;
    check_access(&interface)?;
    Ok(interface)
}

/// Holds the properties or signals of a file against those of the code.
fn same(interface: &str, mut file: Vec<(&str, &str)>, code: &[Field]) -> Result<(), String> {
    let mut code = code.to_vec();
    file.sort();
    code.sort();
    let odd = file.iter().find(|one| !code.contains(one)).or(code.iter().find(|one| !file.contains(one)));
    odd.map_or(Ok(()), |(name, types)| Err(format!("{interface}.{name} ({types}) is not in both file and code")))
}

/// A property is writable exactly if it has a setter.
fn check_access(interface: &Interface) -> Result<(), String> {
    let odd = interface.properties.iter().find(|(_, property)| property.writable != property.setter.is_some());
    odd.map_or(Ok(()), |(name, _)| Err(format!("{}.{name} is writable in file or code alone", interface.name)))
}

fn parse(document: &str) -> Result<zbus_xml::Node<'_>, String> {
    zbus_xml::Node::try_from(document).map_err(|error| format!("introspection data cannot be read: {error}"))
}

/// Reads a document of interfaces.
fn read(document: &str) -> Result<HashMap<String, Interface>, String> {
    let node = parse(document)?;
    let texts = elements(document);
    let parsed = node.interfaces();
    if texts.len() != parsed.len() {
        return Err("an interface element could not be told from its text".to_owned());
    }
    parsed.iter().zip(texts).map(|(one, text)| Ok((one.name().to_string(), interface(one, text)?))).collect()
}

/// The text of each `<interface>` element.
fn elements(document: &str) -> Vec<&str> {
    const END: &str = "</interface>";
    let mut rest = document;
    let mut found = Vec::new();
    while let Some(start) = rest.find("  <interface ") {
        let Some(length) = rest[start..].find(END) else { break };
        found.push(&rest[start..start + length + END.len()]);
        rest = &rest[start + length..];
    }
    found
}

fn interface(parsed: &zbus_xml::Interface<'_>, text: &str) -> Result<Interface, String> {
    let methods = parsed.methods().map(|one| Ok((one.name().to_string(), method(one)?)));
    let properties = parsed.properties().map(|one| {
        let property = Property { signature: one.ty().to_string(), writable: one.access().write(), setter: None };
        (one.name().to_string(), property)
    });
    let signals = parsed.signals().map(|one| (one.name().to_string(), types(one.args().iter())));
    Ok(Interface {
        name: parsed.name().to_string(),
        xml: format!("{text}\n"),
        methods: methods.collect::<Result<_, String>>()?,
        properties: properties.collect(),
        signals: signals.collect(),
    })
}

fn method(parsed: &zbus_xml::Method<'_>) -> Result<Method, String> {
    let takes_text = types(parsed.args().iter().filter(|arg| arg.direction() != Some(ArgDirection::Out)));
    let takes = Signature::try_from(takes_text.as_str()).map_err(|error| format!("{}: {error}", parsed.name()))?;
    let takes_files = parsed.annotations().iter().any(|one| (one.name(), one.value()) == (TAKES_FILES, "true"));
    Ok(Method { takes, takes_text, takes_files, handler: None })
}

fn types<'a>(args: impl Iterator<Item = &'a zbus_xml::Arg<'a>>) -> String {
    args.map(|arg| arg.ty().to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::call::Outcome;

    impl Table {
        /// A table in which every method is run by `run`.
        pub fn run_by<F>(run: impl Fn(super::super::call::Call) -> F + Clone + Send + Sync + 'static) -> Table
        where
            F: Future<Output = Outcome> + Send + 'static,
        {
            let mut interfaces = read(STANDARD).unwrap();
            for mut interface in FILES.iter().flat_map(|file| read(file).unwrap().into_values()) {
                for (name, method) in &mut interface.methods {
                    method.handler = Some(Handler::new(name.clone().leak(), run.clone()));
                }
                interfaces.insert(interface.name.clone(), interface);
            }
            Table(interfaces)
        }

        /// The options of a method may give descriptors from now on.
        pub fn let_take_files(&mut self, interface: &str, method: &str) {
            let method = self.0.get_mut(interface).and_then(|interface| interface.methods.get_mut(method));
            method.unwrap().takes_files = true;
        }
    }

    fn offer() -> Offer {
        let method = |name| Handler::new(name, |call: super::super::call::Call| async move { call.done() });
        Offer {
            interface: "a.b",
            methods: vec![method("Do")],
            setters: vec![method("Level")],
            fields: &[("Level", "u")],
            signals: &[("Done", "sb")],
        }
    }

    fn file(content: &str) -> Interface {
        let document = format!("<node>\n  <interface name=\"a.b\">{content}</interface>\n</node>");
        read(&document).unwrap().remove("a.b").unwrap()
    }

    const METHOD: &str =
        "<method name=\"Do\"><arg type=\"s\" direction=\"in\"/><arg type=\"o\" direction=\"out\"/></method>";
    const SIGNAL: &str = "<signal name=\"Done\"><arg type=\"s\"/><arg type=\"b\"/></signal>";
    const LEVEL: &str = "<property name=\"Level\" type=\"u\" access=\"readwrite\"/>";

    #[test]
    fn file_and_code_must_say_the_same() {
        let whole = join(file(&[METHOD, SIGNAL, LEVEL].concat()), offer()).unwrap();
        assert_eq!(whole.methods["Do"].takes_text, "s");
        for (content, odd) in [
            ([SIGNAL, LEVEL, ""].concat(), "a.b.Do"),
            ([METHOD, LEVEL, ""].concat(), "a.b.Done"),
            ([METHOD, SIGNAL, ""].concat(), "a.b.Level"),
            ([METHOD, SIGNAL, &LEVEL.replace("readwrite", "read")].concat(), "a.b.Level"),
            ([METHOD, SIGNAL, &LEVEL.replace("\"u\"", "\"t\"")].concat(), "a.b.Level"),
            ([METHOD, SIGNAL, LEVEL, "<method name=\"More\"/>"].concat(), "a.b.More"),
        ] {
            let error = join(file(&content), offer()).unwrap_err();
            assert!(error.starts_with(odd), "{error}");
        }
    }

    #[test]
    fn every_member_and_argument_is_named_and_explained() {
        const DOC: &str = "org.gtk.GDBus.DocString";
        for document in FILES {
            for one in parse(document).unwrap().interfaces() {
                let explained =
                    |of: &[zbus_xml::Annotation<'_>]| of.iter().any(|a| a.name() == DOC && !a.value().is_empty());
                assert!(
                    one.methods().all(|m| explained(m.annotations()) && m.args().iter().all(|a| a.name().is_some()))
                );
                assert!(
                    one.signals().all(|s| explained(s.annotations()) && s.args().iter().all(|a| a.name().is_some()))
                );
                assert!(one.properties().all(|p| explained(p.annotations())));
                const EMITS: &str = "org.freedesktop.DBus.Property.EmitsChangedSignal";
                assert!(one.properties().all(|p| p.annotations().iter().any(|a| a.name() == EMITS)));
            }
        }
    }
}
