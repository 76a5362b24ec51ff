//! virtd as a client sees it: calls by name, errors as `(name, message)`, signals in the order in which they came.

use futures_util::StreamExt as _;
use std::collections::HashMap;
use zbus::DBusError as _;
use zbus::message::Type;
use zbus::{Connection, Message, MessageStream, OwnedVariant, Variant};

/// A call's error: name and message.
pub type Refusal = (String, String);

/// An `a{sv}`.
pub type Options<'a> = HashMap<&'a str, Variant<'a>>;

/// Options from pairs.
pub fn options<'a>(pairs: impl IntoIterator<Item = (&'a str, Variant<'a>)>) -> Options<'a> {
    pairs.into_iter().collect()
}

/// A descriptor among options.
pub fn descriptor(file: &std::fs::File) -> zbus::wire::Fd<'static> {
    let file = std::os::fd::OwnedFd::from(file.try_clone().expect("a copy"));
    zbus::wire::Fd::from(zbus::wire::OwnedFd::from(file))
}

/// A client of virtd.
#[derive(Clone)]
pub struct Client {
    /// Its connection.
    pub connection: Connection,
}

impl Client {
    /// Calls any member of any object of virtd's.
    pub async fn call<B>(&self, path: &str, member: &str, body: &B) -> Result<Message, Refusal>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        let (interface, method) = member.rsplit_once('.').expect("interface.method");
        let reply = self.connection.call_method(Some("org.virt"), path, Some(interface), method, body).await;
        reply.map_err(|error| match error {
            zbus::Error::MethodError(name, text, _) => (name.to_string(), text.unwrap_or_default()),
            zbus::Error::FDO(error) => (error.name().to_string(), error.to_string()),
            other => panic!("{member} of {path}: {other}"),
        })
    }

    /// Calls a member of which it is fine if it fails, or nobody is there to answer: whether it was done.
    pub async fn ask<B>(&self, path: &str, member: &str, body: &B) -> bool
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        let (interface, method) = member.rsplit_once('.').expect("interface.method");
        self.connection.call_method(Some("org.virt"), path, Some(interface), method, body).await.is_ok()
    }

    /// Defines a domain.
    pub async fn define(&self, xml: &str) -> Result<Domain, Refusal> {
        self.path_from("DefineDomain", &(xml, options([]))).await
    }

    /// Finds a domain.
    pub async fn named(&self, name: &str) -> Result<Domain, Refusal> {
        self.path_from("GetDomainByName", &(name,)).await
    }

    /// Calls a method of the manager whose only answer is a domain.
    pub async fn path_from<B>(&self, method: &str, body: &B) -> Result<Domain, Refusal>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        let reply = self.call("/org/virt", &format!("org.virt.Manager.{method}"), body).await?;
        let path = reply.body().deserialize::<zbus::ObjectPath<'_>>().expect("a path").to_string();
        Ok(Domain { client: self.clone(), path })
    }

    /// All domains there are.
    pub async fn domains(&self) -> Vec<Domain> {
        let listed = self.call("/org/virt", "org.virt.Manager.ListDomains", &(options([]),)).await.expect("a list");
        let listed: Vec<(zbus::OwnedObjectPath, String, String, String, bool)> =
            listed.body().deserialize().expect("a(osssb)");
        listed.into_iter().map(|(path, ..)| Domain { client: self.clone(), path: path.to_string() }).collect()
    }

    /// A property of any object.
    pub async fn property<T>(&self, path: &str, interface: &str, name: &str) -> T
    where
        T: TryFrom<OwnedVariant>,
        T::Error: std::fmt::Debug,
    {
        let reply = self.call(path, "org.freedesktop.DBus.Properties.Get", &(interface, name)).await.expect(name);
        reply.body().deserialize::<OwnedVariant>().expect("a variant").try_into().expect("the type")
    }

    /// Records everything virtd signals from now on.
    pub async fn watch(&self) -> Watch {
        let rule = zbus::MatchRule::builder().msg_type(Type::Signal).sender("org.virt").build().expect("a rule");
        let stream = MessageStream::for_match_rule(rule, &self.connection, std::num::NonZeroUsize::new(10_000))
            .await
            .expect("a match");
        Watch { stream }
    }
}

/// A domain.
#[derive(Clone)]
pub struct Domain {
    /// Whose view it is.
    pub client: Client,
    /// Its path.
    pub path: String,
}

impl Domain {
    /// Calls a method of `org.virt.Domain`.
    pub async fn call<B>(&self, method: &str, body: &B) -> Result<Message, Refusal>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        self.client.call(&self.path, &format!("org.virt.Domain.{method}"), body).await
    }

    /// Calls one that takes only options, without any.
    pub async fn run(&self, method: &str) -> Result<Message, Refusal> {
        self.call(method, &(options([]),)).await
    }

    /// Calls one that takes nothing.
    pub async fn bare(&self, method: &str) -> Result<Message, Refusal> {
        self.call(method, &()).await
    }

    /// A property.
    pub async fn property<T>(&self, name: &str) -> T
    where
        T: TryFrom<OwnedVariant>,
        T::Error: std::fmt::Debug,
    {
        self.client.property(&self.path, "org.virt.Domain", name).await
    }

    /// `State` and `StateReason`.
    pub async fn state(&self) -> (String, String) {
        (self.property("State").await, self.property("StateReason").await)
    }

    /// Waits until virtd, which has just started, has done what was to be done about it: then it is its callers' turn again.
    /// The call that waits for that asks for nothing that could be done.
    pub async fn is_looked_after(&self) {
        while let Err((name, _)) = self.call("UpdateDevice", &("", options([]))).await
            && name == "org.virt.Error.Busy"
        {}
    }

    /// Waits until it is off.
    pub async fn is_off(&self) {
        let mut watch = self.client.watch().await;
        while self.state().await.0 != "shutoff" {
            watch.next().await;
        }
    }

    /// Its configuration.
    pub async fn xml(&self) -> String {
        self.run("GetXML").await.expect("GetXML").body().deserialize().expect("a string")
    }
}

/// What virtd has signalled.
pub struct Watch {
    stream: MessageStream,
}

impl Watch {
    /// The next lifecycle event of one domain, as `event detail`.
    pub async fn lifecycle(&mut self, path: &str) -> String {
        loop {
            let message = self.next().await;
            if let Some(event) = lifecycle_of(&message, path) {
                return event;
            }
        }
    }

    /// All lifecycle events of one domain up to and including `last`.
    pub async fn until(&mut self, path: &str, last: &str) -> Vec<String> {
        let mut seen = Vec::new();
        while seen.last().is_none_or(|event| event != last) {
            seen.push(self.lifecycle(path).await);
        }
        seen
    }

    /// The next signal.
    pub async fn next(&mut self) -> Message {
        let next = tokio::time::timeout(super::PATIENCE, self.stream.next()).await;
        next.expect("a signal in time").expect("the bus").expect("a message")
    }
}

/// `event detail` if it is a `Lifecycle` of that domain.
pub fn lifecycle_of(message: &Message, path: &str) -> Option<String> {
    let header = message.header();
    let is_it = header.member().is_some_and(|m| m == "Lifecycle") && header.path().is_some_and(|p| p == path);
    is_it.then(|| {
        let (event, detail): (String, String) = message.body().deserialize().expect("ss");
        format!("{event} {detail}")
    })
}
