//! The beds: a host, and somebody else who has to do with it.

use std::sync::Arc;
use uuid::Uuid;
use virt_drivers::mirror::Mirror;
use virt_drivers::test::TestHost;
use virt_model::driver::Driver;
use virt_model::driver::inventory::{HostProfile, Key};

/// What somebody else does to a machine.
#[derive(Clone, Copy, Debug)]
pub enum Act<'a> {
    Rename(&'a str),
    Retitle(&'a str),
    Delete,
    Start,
    Stop {
        forced: bool,
    },
    Pause,
    Unpause,
    /// It is on its way from one state to another, and stays there.
    Between,
}

/// What becomes of the connection.
#[derive(Clone, Copy, Debug)]
pub enum Line {
    Hangs,
    Cut,
    Back,
}

/// A host.
pub trait Bed: Send + Sync {
    /// What the table calls it.
    fn called(&self) -> &'static str;

    /// What it can do.
    fn words(&self) -> &'static [&'static str];

    /// A driver that speaks to it.
    fn driver(&self, profile: HostProfile) -> Arc<dyn Driver>;

    /// Somebody makes a machine that is off.
    fn make(&self, uuid: Uuid, name: &str) -> Key;

    /// Somebody does something to it.
    fn act(&self, key: &Key, act: Act<'_>);

    /// How often it was reset or rebooted.
    fn resets(&self, key: &Key) -> u32;

    /// Something becomes of the connection.
    fn line(&self, line: Line);

    /// Another host like this, that nobody has used.
    fn another(&self) -> Box<dyn Bed>;
}

/// Every bed there is.
pub fn all() -> Vec<Box<dyn Bed>> {
    vec![Box::new(InMemory::default())]
}

/// The host in memory.
#[derive(Default)]
pub struct InMemory(TestHost);

impl Bed for InMemory {
    fn called(&self) -> &'static str {
        "test"
    }

    fn words(&self) -> &'static [&'static str] {
        &["start", "shutdown", "reboot", "reset", "suspend", "rename"]
    }

    fn driver(&self, profile: HostProfile) -> Arc<dyn Driver> {
        Arc::new(Mirror::new(self.0.connection(), profile))
    }

    fn make(&self, uuid: Uuid, name: &str) -> Key {
        self.0.create(uuid, name)
    }

    fn act(&self, key: &Key, act: Act<'_>) {
        match act {
            Act::Rename(name) => self.0.rename(key, name),
            Act::Retitle(title) => self.0.set_title(key, title),
            Act::Delete => self.0.delete(key),
            Act::Start => self.0.start(key),
            Act::Stop { forced } => self.0.stop(key, forced),
            Act::Pause => self.0.pause(key),
            Act::Unpause => self.0.unpause(key),
            Act::Between => self.0.is_on_its_way(key),
        }
    }

    fn resets(&self, key: &Key) -> u32 {
        self.0.resets(key)
    }

    fn line(&self, line: Line) {
        match line {
            Line::Hangs => self.0.hang(),
            Line::Cut => self.0.cut_off(),
            Line::Back => self.0.bring_back(),
        }
    }

    fn another(&self) -> Box<dyn Bed> {
        Box::new(InMemory::default())
    }
}
