//! The objects on the bus: for each kind its properties, its members and its paths. A file a kind; what they share is here.

mod adjust;
mod agent;
pub mod checkpoint;
mod devices;
mod disks;
pub mod domain;
pub mod host;
pub mod job;
pub mod manager;
pub mod network;
pub mod nodedev;
mod options;
pub mod paths;
pub mod pool;
pub mod secret;
pub mod snapshot;
mod stats;
pub mod storage;
pub mod subscription;
mod told;
pub mod volume;

use crate::bus::call::{Call, Handler, Outcome};
use crate::bus::rows::Object;
use crate::bus::table::Offer;
use crate::bus::wire::Field;
use crate::error::Error;
use std::sync::Arc;
use virt_service::Service;
use virt_service::facts::ObjectFacts;
use virt_service::verb::Verb;

/// Gives `FIELDS` and `row`: the properties of one kind of object, a line each, of what is published of it.
macro_rules! properties {
    ($facts:ident: $type:ty { $($name:literal = $kind:ident($value:expr);)+ }) => {
        /// The properties and their types.
        pub const FIELDS: &[$crate::bus::wire::Field] = &[$(($name, $crate::bus::wire::kind::$kind)),+];

        fn row($facts: &$type) -> $crate::bus::wire::Row {
            $crate::bus::wire::Row::new(FIELDS, &[$($crate::bus::wire::Value::$kind($value)),+])
        }
    };
}
pub(crate) use properties;

/// The same with long properties behind them, of which a line gives the type; what is published writes their values.
macro_rules! long_properties {
    ($facts:ident: $type:ty { $($name:literal = $kind:ident($value:expr);)+ } { $($long:literal: $long_type:literal;)+ }) => {
        /// The properties and their types.
        pub const FIELDS: &[$crate::bus::wire::Field] =
            &[$(($name, $crate::bus::wire::kind::$kind),)+ $(($long, $long_type),)+];

        fn row($facts: &std::sync::Arc<$type>) -> $crate::bus::wire::Row {
            let values = [$($crate::bus::wire::Value::$kind($value)),+];
            $crate::bus::wire::Row::with_long(FIELDS, &values, $facts.clone())
        }
    };
}
pub(crate) use long_properties;

/// What is published of an object of a kind beside domains.
pub struct Published {
    /// The object.
    pub object: Object,
    /// How its events are told on the manager; `None` where they are not, and it has none of its own.
    pub lifecycle: Option<Lifecycle>,
}

/// The signal of a manager interface that tells the events of a kind of object.
pub struct Lifecycle {
    /// The interface.
    pub manager: &'static str,
    /// The signal.
    pub member: &'static str,
    /// What stands between the path and the event: uuid and name where there is a detail, else one of them.
    pub names: Vec<String>,
    /// The detail of the event stands behind it.
    pub detailed: bool,
}

/// See [`Published`]: a line for each kind.
pub fn published(facts: &ObjectFacts) -> Published {
    match facts {
        ObjectFacts::Pool(facts) => pool::published(facts),
        ObjectFacts::Volume(facts) => volume::published(facts),
        ObjectFacts::Network(facts) => network::published(facts),
        ObjectFacts::Secret(facts) => secret::published(facts),
        ObjectFacts::NodeDevice(facts) => nodedev::published(facts),
        ObjectFacts::Host(facts) => host::published(facts),
    }
}

/// The members of one kind of object in the making. `find` gives the object that a call is for, or says that there is none.
pub struct Members<T> {
    service: Arc<Service>,
    find: fn(&Arc<Service>, &Call) -> Result<T, Error>,
    methods: Vec<Handler>,
    setters: Vec<Handler>,
}

impl<T: Send + 'static> Members<T> {
    /// None yet.
    pub fn new(service: &Arc<Service>, find: fn(&Arc<Service>, &Call) -> Result<T, Error>) -> Members<T> {
        Members { service: service.clone(), find, methods: Vec::new(), setters: Vec::new() }
    }

    /// A method.
    pub fn method<F>(mut self, verb: &'static Verb, run: impl Fn(T, Call) -> F + Copy + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        self.methods.push(self.handler(verb, run));
        self
    }

    /// The setting of a property.
    pub fn setter<F>(mut self, verb: &'static Verb, run: impl Fn(T, Call) -> F + Copy + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        self.setters.push(self.handler(verb, run));
        self
    }

    /// All of them, with the properties and signals of `interface`.
    pub fn offer(self, interface: &'static str, fields: &'static [Field], signals: &'static [Field]) -> Offer {
        Offer { interface, methods: self.methods, setters: self.setters, fields, signals }
    }

    /// The answer of a verb that may change something, good or bad, follows the signals of what it did.
    fn handler<F>(&self, verb: &'static Verb, run: impl Fn(T, Call) -> F + Copy + Send + Sync + 'static) -> Handler
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        let (service, find) = (self.service.clone(), self.find);
        let found = move |call: Call| {
            let service = service.clone();
            async move { run(find(&service, &call)?, call).await }
        };
        match verb.changes() {
            true => Handler::change(verb.member, self.service.events().clone(), found),
            false => Handler::new(verb.member, found),
        }
    }
}

#[cfg(test)]
mod tests {
    use virt_service::verb;

    /// A member without a row would run in no frame: it could forget permission, and `Can` would not know it.
    #[test]
    fn each_method_of_the_files_has_its_row_and_each_row_its_method() {
        for &document in crate::bus::table::FILES {
            for interface in zbus_xml::Node::try_from(document).unwrap().interfaces() {
                let (_, rows) = verb::TABLES.iter().find(|(name, _)| *name == interface.name().as_str()).unwrap();
                let methods = interface.methods().map(|method| method.name().to_string());
                let writable = interface.properties().filter(|property| property.access().write());
                let mut file: Vec<_> = methods.chain(writable.map(|property| property.name().to_string())).collect();
                let mut known: Vec<_> = rows.iter().map(|verb| verb.member.to_owned()).collect();
                file.sort();
                known.sort();
                assert_eq!(file, known, "{}", interface.name());
            }
        }
    }
}
