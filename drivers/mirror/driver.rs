//! A host as the driver, and its machines as the guests, that the service knows.

use super::machines::{Ours, condition};
use super::picture::{Picture, Run};
use super::remote::{Deed, Remote};
use super::{Inner, Mirror};
use async_trait::async_trait;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::mpsc::UnboundedSender;
use virt_model::domain::DomainDef;
use virt_model::driver::inventory::{Ability, Adopted, HostProfile, HostReport, Inventory, Key};
use virt_model::driver::{
    Driver, DriverError, EventSink, Instance, Launch, Reconnect, Reconnected, Running, ShutdownMode,
};
use virt_model::lock::lock;
use virt_model::xml::Finding;

/// What the service does by [`Inventory`] where machines are the host's.
fn by_inventory() -> DriverError {
    DriverError::Unsupported("its host keeps this machine, and starts and finds it by itself".to_owned())
}

#[async_trait]
impl<R: Remote> Driver for Mirror<R> {
    fn name(&self) -> &'static str {
        R::DRIVER
    }

    fn types(&self) -> &'static [&'static str] {
        R::TYPES
    }

    fn lacks(&self) -> &'static [&'static str] {
        &["Screenshot", "OpenGraphics", "OpenChannel", "OpenConsole", "SendKey"]
    }

    fn inventory(&self) -> Option<&dyn Inventory> {
        Some(self)
    }

    async fn complete(&self, _def: &mut DomainDef) -> Result<(), DriverError> {
        Err(by_inventory())
    }

    async fn check(&self, _def: &DomainDef) -> Vec<Finding> {
        Vec::new()
    }

    async fn native(&self, _def: &DomainDef, _format: &str) -> Result<Vec<String>, DriverError> {
        Err(by_inventory())
    }

    async fn capabilities(&self) -> Result<String, DriverError> {
        Err(DriverError::Unsupported(format!("the driver '{}' has no document of what its host can do", R::DRIVER)))
    }

    async fn belongings(&self, _def: &DomainDef) -> Vec<PathBuf> {
        Vec::new()
    }

    async fn start(&self, _launch: Launch) -> Result<Running, DriverError> {
        Err(by_inventory())
    }

    async fn reconnect(&self, _guest: Reconnect) -> Result<Option<Reconnected>, DriverError> {
        Err(by_inventory())
    }
}

#[async_trait]
impl<R: Remote> Inventory for Mirror<R> {
    fn profile(&self) -> &HostProfile {
        &self.0.profile
    }

    fn address(&self) -> String {
        self.0.remote.address()
    }

    fn proof(&self) -> &'static str {
        R::PROOF
    }

    fn abilities(&self) -> Vec<Ability> {
        if self.0.profile.read_only { Vec::new() } else { self.0.remote.abilities().to_vec() }
    }

    fn reachable(&self) -> Result<(), DriverError> {
        self.0.reachable()
    }

    fn watch(&self, to: UnboundedSender<HostReport>) {
        tokio::spawn(self.0.clone().follow(to));
    }

    fn look_again(&self) {
        self.0.wanted.notify_one();
    }

    async fn refresh(&self) -> Result<(), DriverError> {
        self.0.reachable()?;
        self.0.looks().await
    }

    fn adopt(&self, key: &Key, events: EventSink) -> Option<Adopted> {
        let mut machines = lock(&self.0.machines);
        machines.follow(key, events).map(|picture| self.adopted(picture))
    }

    async fn start(&self, key: &Key, events: EventSink) -> Result<Adopted, DriverError> {
        self.0.does(key, Deed::Start, Ours::Start(events), |picture| picture.run.is_active()).await?;
        let machines = lock(&self.0.machines);
        // Somebody else may have ended it at once, which is reported to who follows it.
        machines.picture(key).map(|picture| self.adopted(picture)).ok_or(DriverError::Gone)
    }

    async fn rename(&self, key: &Key, name: &str) -> Result<(), DriverError> {
        self.0.renames(key, name).await
    }
}

impl<R: Remote> Mirror<R> {
    fn adopted(&self, picture: &Picture) -> Adopted {
        let instance = Arc::new(MirroredGuest { host: self.0.clone(), key: picture.seen.key.clone() });
        Adopted { instance, condition: condition(picture), live: picture.seen.def.clone() }
    }
}

/// A machine that runs on a host.
struct MirroredGuest<R> {
    host: Arc<Inner<R>>,
    key: Key,
}

impl<R: Remote> MirroredGuest<R> {
    /// Asks for what is not waited for, or cannot be seen: whatever it is then is right.
    async fn asks(&self, deed: Deed) -> Result<(), DriverError> {
        self.host.does(&self.key, deed, Ours::Nothing, |_| true).await
    }
}

/// Refuses a way to ask a guest that is not the host's own.
fn as_the_host_chooses(mode: ShutdownMode) -> Result<(), DriverError> {
    match mode {
        ShutdownMode::Default => Ok(()),
        ShutdownMode::Acpi | ShutdownMode::Agent => {
            let text = "its host chooses by itself how it asks a guest; leave 'mode' out".to_owned();
            Err(DriverError::Unsupported(text))
        }
    }
}

#[async_trait]
impl<R: Remote> Instance for MirroredGuest<R> {
    async fn shutdown(&self, mode: ShutdownMode) -> Result<(), DriverError> {
        as_the_host_chooses(mode)?;
        self.asks(Deed::Shutdown).await
    }

    async fn reboot(&self, mode: ShutdownMode) -> Result<(), DriverError> {
        as_the_host_chooses(mode)?;
        self.asks(Deed::Reboot).await
    }

    async fn reset(&self) -> Result<(), DriverError> {
        self.asks(Deed::Reset).await
    }

    async fn suspend(&self) -> Result<(), DriverError> {
        self.host.does(&self.key, Deed::Suspend, Ours::Suspend, |picture| picture.run.has_left(Run::Running)).await
    }

    async fn resume(&self) -> Result<(), DriverError> {
        self.host.does(&self.key, Deed::Resume, Ours::Resume, |picture| picture.run.has_left(Run::Paused)).await
    }

    async fn destroy(&self, _graceful: bool) -> Result<(), DriverError> {
        let mark = lock(&self.host.machines).picture(&self.key).and_then(|picture| picture.mark);
        let runs_on = move |picture: &Picture| picture.run.is_active() && picture.mark == mark;
        let ended = move |picture: &Picture| picture.run != Run::Between && !runs_on(picture);
        self.host.does(&self.key, Deed::Destroy, Ours::Destroy, ended).await
    }
}
