//! One call as a handler sees it: who calls, what was sent, how to answer.

use super::Line;
use super::rows::Objects;
use super::source::which;
use super::wire;
use crate::error::Error;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use virt_model::domain::nearest;
use virt_model::driver::GivenFile;
use virt_model::xml::shorten;
use virt_service::authz::Caller;
use virt_service::events::Events;
use zbus::message::{Body, Header};
use zbus::wire::{Endian, Fd};
use zbus::{DynamicType, Message, ObjectPath, OwnedVariant, Signature, Type};

/// A call whose member and signature have been checked.
#[derive(Debug)]
pub struct Call {
    message: Message,
    caller: Caller,
    path: Arc<str>,
    /// What it has brought and nobody has taken, in the places that its message gives them.
    files: Mutex<Vec<Option<GivenFile>>>,
    line: Option<Line>,
}

/// An answer.
pub enum Reply {
    /// Made already.
    Ready(Message),
    /// Made of many rows: when it is made, it must be true until it is on its way.
    Listing(Listing),
}

/// Makes an answer of the rows as they are.
pub type Listing = Box<dyn Fn(&Objects) -> Result<Message, Error> + Send + Sync>;

/// What a handler comes to.
pub type Outcome = Result<Reply, Error>;

/// Runs one member: a method, or the setting of a property.
#[derive(Clone)]
pub struct Handler {
    /// The member's name.
    pub member: &'static str,
    run: Arc<dyn Fn(Call) -> BoxFuture<'static, Outcome> + Send + Sync>,
}

impl Handler {
    /// A handler for `member`.
    pub fn new<F>(member: &'static str, run: impl Fn(Call) -> F + Send + Sync + 'static) -> Handler
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        Handler { member, run: Arc::new(move |call| run(call).boxed()) }
    }

    /// A handler for a member that may change something: its answer, good or bad, is sent after the signals of what it
    /// did.
    pub fn change<F>(member: &'static str, events: Events, run: impl Fn(Call) -> F + Send + Sync + 'static) -> Handler
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        Handler::new(member, move |call| {
            let (events, outcome) = (events.clone(), run(call));
            async move {
                let outcome = outcome.await;
                events.flush().await;
                outcome
            }
        })
    }

    /// Runs it.
    pub async fn run(&self, call: Call) -> Outcome {
        (self.run)(call).await
    }
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.member)
    }
}

impl Call {
    /// A call by `caller` to the object at `path`, with the files that it has brought.
    pub fn new(message: Message, caller: Caller, path: Arc<str>, files: Vec<GivenFile>) -> Call {
        Call { message, caller, path, files: Mutex::new(files.into_iter().map(Some).collect()), line: None }
    }

    /// The same, whose caller can be told more later.
    pub fn on(self, line: Line) -> Call {
        Call { line: Some(line), ..self }
    }

    /// The way to the caller, for what it is to be told after the answer.
    pub fn line(&self) -> Option<Line> {
        self.line.clone()
    }

    /// Who calls.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// The object called.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// What was sent, to be read without a copy by [`read`]: for what may be large.
    pub fn body(&self) -> Body {
        self.message.body()
    }

    /// What was sent.
    pub fn read<T: Type + DeserializeOwned>(&self) -> Result<T, Error> {
        read(&self.message.body())
    }

    /// What was sent, where that is options alone.
    pub fn options(&self) -> Result<Options, Error> {
        self.read()
    }

    /// The file that an option gives, if given.
    pub fn file(&self, options: &mut Options, key: &'static str) -> Result<Option<GivenFile>, Error> {
        let read = |value: &OwnedVariant| value.downcast_ref::<Fd<'_>>().ok().and_then(which);
        let place = options.take(key, "h, a descriptor", read)?;
        place.map(|place| self.take_file(key, place)).transpose()
    }

    /// The files that an option gives, in its order; none if not given.
    pub fn files(&self, options: &mut Options, key: &'static str) -> Result<Vec<GivenFile>, Error> {
        let read = |value: &OwnedVariant| {
            let files = Vec::<Fd<'_>>::try_from(value.try_clone().ok()?).ok()?;
            files.into_iter().map(which).collect::<Option<Vec<_>>>()
        };
        let places = options.take(key, "ah, descriptors", read)?.unwrap_or_default();
        places.into_iter().map(|place| self.take_file(key, place)).collect()
    }

    /// The file that the argument `name` gives.
    pub fn given(&self, name: &str, file: Fd<'_>) -> Result<GivenFile, Error> {
        let place = which(file).ok_or_else(|| Error::argument(format!("'{name}' is not a descriptor of this call")))?;
        self.take_file(name, place)
    }

    fn take_file(&self, key: &str, place: usize) -> Result<GivenFile, Error> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let file = files.get_mut(place).and_then(Option::take);
        file.ok_or_else(|| Error::argument(format!("'{key}' names a descriptor that is used already")))
    }

    /// The value that a property is to be set to. Its type has been checked.
    pub fn value(&self) -> Result<OwnedVariant, Error> {
        let (_, _, value) = self.read::<(String, String, OwnedVariant)>()?;
        Ok(value)
    }

    /// Answers with `value`.
    pub fn reply<T: serde::Serialize + DynamicType>(&self, value: &T) -> Outcome {
        let made = Message::method_return(&self.message.header()).build(value);
        made.map(Reply::Ready).map_err(|error| Error::internal(format!("an answer could not be made: {error}")))
    }

    /// Answers that it is done.
    pub fn done(&self) -> Outcome {
        self.reply(&())
    }

    /// Answers with what `make` makes of the rows.
    pub fn listing<T: serde::Serialize + DynamicType>(
        &self,
        make: impl Fn(&Objects) -> T + Send + Sync + 'static,
    ) -> Outcome {
        let message = self.message.clone();
        Ok(Reply::Listing(Box::new(move |objects| {
            let made = Message::method_return(&message.header()).build(&make(objects));
            made.map_err(|error| Error::internal(format!("an answer could not be made: {error}")))
        })))
    }
}

/// The value of an option of two types.
#[derive(Debug)]
pub enum FlagOrTexts {
    /// `b`
    Flag(bool),
    /// `as`
    Texts(Vec<String>),
}

/// Options, taken out one by one; whatever is left at the end was not understood.
#[derive(Debug, serde::Deserialize)]
#[serde(from = "HashMap<String, OwnedVariant>")]
pub struct Options {
    given: HashMap<String, OwnedVariant>,
    /// The keys that were looked for.
    known: Vec<&'static str>,
}

impl Type for Options {
    const SIGNATURE: &'static Signature = <HashMap<String, OwnedVariant>>::SIGNATURE;
}

impl From<HashMap<String, OwnedVariant>> for Options {
    fn from(given: HashMap<String, OwnedVariant>) -> Options {
        Options { given, known: Vec::new() }
    }
}

impl Options {
    /// A flag; not given means no.
    pub fn flag(&mut self, key: &'static str) -> Result<bool, Error> {
        Ok(self.flag_if_given(key)?.unwrap_or(false))
    }

    /// A flag, if given.
    pub fn flag_if_given(&mut self, key: &'static str) -> Result<Option<bool>, Error> {
        self.take(key, "b, a boolean", |value| value.downcast_ref::<bool>().ok())
    }

    /// A text, if given.
    pub fn text(&mut self, key: &'static str) -> Result<Option<String>, Error> {
        self.take(key, "s, a string", |value| value.downcast_ref::<&str>().ok().map(str::to_owned))
    }

    /// A number of type `u`, if given.
    pub fn number(&mut self, key: &'static str) -> Result<Option<u32>, Error> {
        self.take(key, "u, a number", |value| value.downcast_ref::<u32>().ok())
    }

    /// A number of type `i`, if given.
    pub fn integer(&mut self, key: &'static str) -> Result<Option<i32>, Error> {
        self.take(key, "i, a number that may be negative", |value| value.downcast_ref::<i32>().ok())
    }

    /// A number of type `t`, if given.
    pub fn long(&mut self, key: &'static str) -> Result<Option<u64>, Error> {
        self.take(key, "t, a long number", |value| value.downcast_ref::<u64>().ok())
    }

    /// A number of type `x`, if given.
    pub fn signed(&mut self, key: &'static str) -> Result<Option<i64>, Error> {
        self.take(key, "x, a long number that may be negative", |value| value.downcast_ref::<i64>().ok())
    }

    /// Paths of objects; none if not given.
    pub fn paths(&mut self, key: &'static str) -> Result<Vec<String>, Error> {
        let read = |value: &OwnedVariant| {
            let paths = Vec::<ObjectPath<'_>>::try_from(value.try_clone().ok()?).ok()?;
            Some(paths.iter().map(ToString::to_string).collect())
        };
        Ok(self.take(key, "ao, paths of objects", read)?.unwrap_or_default())
    }

    /// The path of an object, if given.
    pub fn path(&mut self, key: &'static str) -> Result<Option<String>, Error> {
        let read = |value: &OwnedVariant| value.downcast_ref::<ObjectPath<'_>>().ok().map(|path| path.to_string());
        self.take(key, "o, the path of an object", read)
    }

    /// Texts; none if not given.
    pub fn texts(&mut self, key: &'static str) -> Result<Vec<String>, Error> {
        let read = |value: &OwnedVariant| value.try_clone().ok().and_then(|value| Vec::<String>::try_from(value).ok());
        Ok(self.take(key, "as, strings", read)?.unwrap_or_default())
    }

    /// A flag or texts, if given.
    pub fn flag_or_texts(&mut self, key: &'static str) -> Result<Option<FlagOrTexts>, Error> {
        self.take(key, "b or as", |value| match value.downcast_ref::<bool>() {
            Ok(flag) => Some(FlagOrTexts::Flag(flag)),
            Err(_) => Vec::<String>::try_from(value.try_clone().ok()?).ok().map(FlagOrTexts::Texts),
        })
    }

    /// Nothing else is understood.
    pub fn end(self) -> Result<(), Error> {
        let Some(key) = self.given.keys().min() else { return Ok(()) };
        let there = match (nearest(&self.known, key), &self.known[..]) {
            (Some(near), _) => format!("was '{near}' meant?"),
            (None, []) => "there are none".to_owned(),
            (None, known) => format!("there are {}", known.join(", ")),
        };
        Err(Error::argument(format!("there is no option '{}' here; {there}", shorten(key))))
    }

    fn take<T>(
        &mut self,
        key: &'static str,
        wanted: &str,
        read: impl FnOnce(&OwnedVariant) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        self.known.push(key);
        let Some(value) = self.given.remove(key) else { return Ok(None) };
        match read(&value) {
            Some(value) => Ok(Some(value)),
            None => {
                let got = value.value_signature().to_string();
                Err(Error::argument(format!("option '{key}' is of type {wanted}, not {got}")))
            }
        }
    }
}

/// The arguments in a body, which may lie in it.
pub fn read<'b, T: Type + Deserialize<'b>>(body: &'b Body) -> Result<T, Error> {
    body.deserialize().map_err(|error| Error::invalid_args(format!("the arguments cannot be read: {error}")))
}

/// An answer whose body is encoded already; `signature` is what it is.
pub fn encoded_reply(to: &Header<'_>, signature: &str, body: &wire::Body) -> Result<Message, Error> {
    encoded(Message::method_return(to), signature, body)
}

/// A signal whose body is encoded already.
pub fn signal(path: &str, interface: &str, member: &str, signature: &str, body: &wire::Body) -> Result<Message, Error> {
    encoded(Message::signal(path, interface, member), signature, body)
}

fn encoded(builder: zbus::message::Builder<'_>, signature: &str, body: &wire::Body) -> Result<Message, Error> {
    // SAFETY: there are no file descriptors, and a test for each use holds the bytes to the signature.
    let made = unsafe { builder.endian(Endian::Little).build_raw_body(body.bytes(), signature, Vec::new()) };
    made.map_err(|error| Error::internal(format!("a message could not be made: {error}")))
}

/// The answer that says no.
pub fn refusal(to: &Header<'_>, error: &Error) -> zbus::Result<Message> {
    Message::error(to, error.name).build(&error.text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbus::Variant;

    fn refused(key: &str, known: &[&'static str]) -> String {
        let value = OwnedVariant::try_from(Variant::from(true)).unwrap();
        let mut options = Options::from(HashMap::from([(key.to_owned(), value)]));
        known.iter().for_each(|key| assert!(!options.flag(key).unwrap()));
        options.end().unwrap_err().text
    }

    #[test]
    fn an_unknown_option_is_answered_with_those_there_are() {
        let start = ["paused", "force-boot", "no-wait"];
        assert_eq!(refused("pauzed", &start), "there is no option 'pauzed' here; was 'paused' meant?");
        assert_eq!(refused("fast", &start), "there is no option 'fast' here; there are paused, force-boot, no-wait");
        assert_eq!(refused("fast", &[]), "there is no option 'fast' here; there are none");
    }
}
