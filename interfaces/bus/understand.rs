//! Which member a call is of, and what it comes to.

use super::answers::{ROOT, is_manager, is_standard, no_object, unknown_property};
use super::call::Handler;
use super::table::Interface;
use super::{Bus, socket};
use crate::error::Error;
use zbus::message::Header;
use zbus::{Message, OwnedVariant};

/// What a call comes to, once it is understood.
pub(super) enum Deed {
    /// An answer from the rows, at once.
    Look(Look),
    /// An answer from many rows.
    Survey(Look),
    /// A handler's work.
    Run(Handler),
}

/// An answer from the rows.
#[derive(Clone, Copy)]
pub(super) enum Look {
    Ping,
    MachineId,
    Introspect,
    Get,
    GetAll,
    ManagedObjects,
}

impl Bus {
    /// Which member is called, with what it takes; nothing is done yet.
    pub(super) fn understand(&self, call: &Message) -> Result<Deed, Error> {
        if socket::is_cut(call) || call.data().len() > 2 * socket::LARGEST {
            return Err(Error::limits(format!("no call of more than {} bytes is read", socket::LARGEST)));
        }
        let header = call.header();
        let (path, interface, member) = names(&header)?;
        let Some(known) = self.interface(path, interface)? else {
            return Err(Error::unknown_interface(format!("{path} has no interface '{interface}'")));
        };
        let Some(method) = known.methods.get(member) else {
            return Err(Error::unknown_method(format!("{interface} has no method '{member}'")));
        };
        if *call.body().signature() != method.takes {
            let got = call.body().signature().to_string_no_parens();
            let text = format!("{interface}.{member} takes ({}), not ({got})", method.takes_text);
            return Err(Error::invalid_args(text));
        }
        match (&method.handler, member) {
            (Some(handler), _) => Ok(Deed::Run(handler.clone())),
            (None, "Set") => self.setter(call, path).map(Deed::Run),
            (None, _) => self.standard(path, member),
        }
    }

    /// The interface called, if the object has it.
    fn interface(&self, path: &str, name: &str) -> Result<Option<&Interface>, Error> {
        let (object, is_node) = self.rows.read(|objects| match objects.get(path) {
            Some(object) => (Some(object.clone()), true),
            None => (None, objects.is_node(path)),
        });
        let has = match name {
            "org.freedesktop.DBus.Peer" => true,
            _ if !is_node => return Err(no_object(path)),
            "org.freedesktop.DBus.Introspectable" => true,
            "org.freedesktop.DBus.Properties" => object.is_some(),
            "org.freedesktop.DBus.ObjectManager" => is_manager(path),
            name => object.is_some_and(|object| object.row_of(name).is_some()),
        };
        Ok(self.table.get(name).filter(|_| has))
    }

    /// The members of the standard interfaces.
    fn standard(&self, path: &str, member: &str) -> Result<Deed, Error> {
        Ok(match member {
            "Ping" => Deed::Look(Look::Ping),
            "GetMachineId" => Deed::Look(Look::MachineId),
            "Get" => Deed::Look(Look::Get),
            "GetAll" => Deed::Look(Look::GetAll),
            "GetManagedObjects" => Deed::Survey(Look::ManagedObjects),
            // A folder may have thousands of children; an object, and what leads to the root, has few.
            "Introspect" if ROOT.starts_with(path) || self.rows.read(|objects| objects.get(path).is_some()) => {
                Deed::Look(Look::Introspect)
            }
            "Introspect" => Deed::Survey(Look::Introspect),
            member => return Err(Error::internal(format!("nothing answers '{member}'"))),
        })
    }

    /// Properties.Set
    fn setter(&self, call: &Message, path: &str) -> Result<Handler, Error> {
        let body = call.body();
        let read = body.deserialize::<(String, String, OwnedVariant)>();
        let (interface, name, value) =
            read.map_err(|error| Error::invalid_args(format!("the arguments cannot be read: {error}")))?;
        let known = self.interface(path, &interface)?.filter(|_| !is_standard(&interface));
        let Some(known) = known else {
            return Err(Error::unknown_interface(format!("{path} has no interface '{interface}' with properties")));
        };
        let property = known.properties.get(&name).ok_or_else(|| unknown_property(&interface, &name))?;
        let Some(setter) = &property.setter else {
            return Err(Error::read_only(format!("{interface}.{name} can only be read")));
        };
        let got = value.value_signature().to_string();
        if got != property.signature {
            let text = format!("{interface}.{name} is of type {}, not {got}", property.signature);
            return Err(Error::invalid_args(text));
        }
        Ok(setter.clone())
    }
}

/// Path, interface and member of a call.
pub(super) fn names<'h>(header: &'h Header<'_>) -> Result<(&'h str, &'h str, &'h str), Error> {
    let (path, member) = (header.path(), header.member());
    let (Some(path), Some(member)) = (path, member) else {
        return Err(Error::invalid_args("the call names no object or no method"));
    };
    let Some(interface) = header.interface() else {
        return Err(Error::unknown_method(format!("the call of '{member}' names no interface")));
    };
    Ok((path.as_str(), interface.as_str(), member.as_str()))
}
