//! Drivers for hosts of other hypervisors, which keep their machines by themselves: what all of them have in common, once. A
//! product says how its host is spoken to ([`Remote`]), and [`Mirror`] makes a driver of that.
//!
//! ```text
//!  follow.rs    one task for each host: connects, takes pictures whenever something may have changed, loses the host, comes back
//!  picture.rs   what a machine is at a moment, and what must have happened between two moments: pure, and tested as a table
//!  machines.rs  what is known of all machines, and to whom news of which go
//!  verb.rs      what is done to a machine: a verb has it to itself, and ends when a picture shows what it did
//!  driver.rs    all that as the driver and the guests that the service knows
//! ```
//!
//! A host that hangs costs nobody anything: reads answer from the last picture, which the service has, each host has a task of its
//! own, and each request its time.

mod driver;
mod follow;
mod machines;
pub mod picture;
pub mod remote;
mod verb;

pub use picture::{Picture, Run};
pub use remote::{Deed, Remote, Which};

use machines::{Asked, Machines};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::sync::{Notify, watch};
use virt_model::driver::DriverError;
use virt_model::driver::inventory::HostProfile;

/// The driver of one host. Clones are the same one.
pub struct Mirror<R>(Arc<Inner<R>>);

struct Inner<R> {
    remote: R,
    profile: HostProfile,
    machines: Mutex<Machines>,
    contact: watch::Sender<Contact>,
    /// Somebody wants the host to be looked at now.
    wanted: Notify,
    /// Held while all machines are looked at: when what was last seen so was asked for.
    looking: tokio::sync::Mutex<Asked>,
}

/// Whether a host answers.
#[derive(Clone, Debug)]
enum Contact {
    /// It does.
    Connected,
    /// It does not, for that long and for this reason.
    Lost(Instant, String),
}

impl<R> Clone for Mirror<R> {
    fn clone(&self) -> Self {
        Mirror(self.0.clone())
    }
}

impl<R: Remote> Mirror<R> {
    /// A driver of that host; nobody speaks to it before it is watched.
    pub fn new(remote: R, profile: HostProfile) -> Mirror<R> {
        let begins = Contact::Lost(Instant::now(), "it has not been connected to yet".to_owned());
        let (machines, wanted, looking) = (Mutex::default(), Notify::new(), tokio::sync::Mutex::default());
        Mirror(Arc::new(Inner { remote, profile, machines, contact: watch::Sender::new(begins), wanted, looking }))
    }
}

impl<R: Remote> Inner<R> {
    /// Refuses while the host does not answer.
    fn reachable(&self) -> Result<(), DriverError> {
        match &*self.contact.borrow() {
            Contact::Connected => Ok(()),
            Contact::Lost(since, why) => {
                let (name, seconds) = (&self.profile.name, since.elapsed().as_secs());
                Err(DriverError::Unreachable(format!(
                    "host '{name}' has not answered for {seconds} s ({why}); what is done to its machines now is refused, and it is \
                     asked again by and by, or at once by Reconnect"
                )))
            }
        }
    }

    /// A request that has its time. Error: `TimedOut`.
    async fn in_time<T>(&self, request: impl Future<Output = Result<T, DriverError>>) -> Result<T, DriverError> {
        let timeout = self.profile.timeout;
        tokio::time::timeout(timeout, request).await.unwrap_or_else(|_| {
            let (name, seconds) = (&self.profile.name, timeout.as_secs());
            Err(DriverError::TimedOut(format!("host '{name}' did not answer within {seconds} s")))
        })
    }
}
