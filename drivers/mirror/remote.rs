//! What a product must be able to say and to do for [`Mirror`](super::Mirror) to make a driver of it.

use super::picture::Picture;
use async_trait::async_trait;
use std::time::Duration;
use virt_model::driver::DriverError;
use virt_model::driver::inventory::{Ability, Key};

/// Of which machines pictures are wanted.
#[derive(Clone, Copy, Debug)]
pub enum Which<'a> {
    /// Of all that the host has.
    All,
    /// Of this one; none if there is no such machine.
    One(&'a Key),
}

/// What a host is asked to do to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// Start it.
    Start,
    /// Ask it to power off.
    Shutdown,
    /// Ask it to reboot. The mark of its run stays.
    Reboot,
    /// Reset it. The mark of its run stays.
    Reset,
    /// Stop its CPUs.
    Suspend,
    /// Let its CPUs go on.
    Resume,
    /// Pull its plug.
    Destroy,
}

/// A host of a product. Each request may hang: `Mirror` drops it then, after as long as the host's profile says.
#[async_trait]
pub trait Remote: Send + Sync + 'static {
    /// The driver's name.
    const DRIVER: &'static str;

    /// The `<domain type='…'>` values of its machines.
    const TYPES: &'static [&'static str];

    /// On what it was tried that we speak to it rightly.
    const PROOF: &'static str;

    /// Where it is, as people say it; empty of what needs no address.
    fn address(&self) -> String;

    /// What it can do to its machines, as far as is known.
    fn abilities(&self) -> &[Ability];

    /// Connects, or sees that the connection stands; product and version.
    async fn connect(&self) -> Result<String, DriverError>;

    /// What machines are and do now: all or nothing.
    async fn pictures(&self, which: Which<'_>) -> Result<Vec<Picture>, DriverError>;

    /// Returns when something may have changed since it last returned. Error: the host may have gone. A host that tells nothing by itself is asked
    /// again and again.
    async fn changed(&self, poll: Duration) -> Result<(), DriverError> {
        tokio::time::sleep(poll).await;
        Ok(())
    }

    /// Asks for a deed. Returns when it is asked or done: what it has done is seen in pictures. Errors: `Refused` in a state in which
    /// it makes no sense, `Hypervisor` with the host's own words, `Gone` if there is no such machine.
    async fn ask(&self, key: &Key, deed: Deed) -> Result<(), DriverError>;

    /// Gives a machine another name. Returns and fails as [`ask`](Remote::ask). A host that cannot has not the word `rename` among its
    /// [`abilities`](Remote::abilities).
    async fn rename(&self, _key: &Key, _name: &str) -> Result<(), DriverError> {
        Err(DriverError::Unsupported("its host has no way to give it another name".to_owned()))
    }
}
