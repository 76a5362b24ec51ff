//! What virtd does: domains, jobs, permissions, events and what is kept on disk. Knows no bus and no hypervisor.

#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod authz;
mod autostart;
mod boot;
mod choices;
mod compare;
mod define;
mod desk;
mod domain;
pub mod error;
pub mod events;
pub mod facts;
#[allow(clippy::disallowed_methods, reason = "its files are those of tests")]
mod fail_point;
pub mod fair;
mod forward_devices;
mod frames;
mod frozen_disks;
mod hosts;
mod image_users;
#[allow(clippy::disallowed_methods, reason = "only asks which inode a path leads to, few at a time, with a limit")]
mod images;
pub mod job;
mod left_behind;
mod lines;
mod lock;
pub mod log;
mod network;
mod nodedev;
pub mod object;
mod plugs;
mod registry;
mod restore;
mod scrape;
mod secret;
mod shared;
pub mod shown;
mod storage;
#[allow(clippy::disallowed_methods, reason = "the folders of virtd itself")]
mod store;
mod stored;
mod subscribe;
mod time;
mod turn;
pub mod uses;
pub mod verb;
mod volumes;

pub use desk::Reading;
pub use domain::{
    Affect, ApplyOptions, BackupOptions, BackupTicket, BlockJobOptions, CreateCheck, CreateOptions, DeleteCheckpoint,
    DeleteOptions, Domain, DumpOptions, ExecOptions, Force, InterfaceAddresses, LETTING_GO, ManagedSaveOptions,
    POWERING_OFF, Plan, ResizeOptions, Resumption, RevertOptions, SaveOptions, SettingsOf, StartOptions, Stats,
    StatsOptions, UndefineCheck, UndefineOptions, Wanted,
};
pub use hosts::OtherHost;
pub use network::{CheckedNetwork, HostEntry, Network};
pub use nodedev::{DetachCheck, HostDevice};
pub use restore::RestoreOptions;
pub use scrape::{MachineStats, Scrape};
pub use secret::{CheckedUndefine, Secret};
pub use shared::{Callers, Host, Limits};
pub use storage::{AddVolume, CloneVolume, CreateVolume, NewCapacity, Pool, Quota, StartPool, StorageCheck, Volume};
pub use store::Paths;
pub use subscribe::{SubscribeOptions, Subscription};

use authz::{Authority, Caller, Subject};
use autostart::Autostart;
use domain::Domains;
use error::{Error, Result};
use events::{Event, Events};
use frames::Changeable as _;
use hosts::Hosts;
use images::Images;
use job::Jobs;
use lock::lock;
use network::Networks;
use nodedev::NodeDevices;
use object::ObjectRef;
use secret::Secrets;
use shared::Shared;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use storage::Pools;
use store::Store;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use verb::Verb;
use virt_model::driver::host_devices::HostDevices;
use virt_model::driver::{Driver, DriverError, MachineChoice};
use virt_model::xml::shorten;

/// What a service needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its folders; made where they are missing.
    pub paths: Paths,
    /// How much a user may have.
    pub limits: Limits,
}

/// How long `close` waits for jobs under way.
const CLOSING: Duration = Duration::from_secs(10);

/// All domains of one host.
pub struct Service {
    shared: Arc<Shared>,
    domains: Arc<Domains>,
    secrets: Arc<Secrets>,
    node_devices: OnceLock<Arc<NodeDevices>>,
    hosts: OnceLock<Hosts>,
    pools: Arc<Pools>,
    networks: Arc<Networks>,
    /// What is still to start with the host; gone when that has begun.
    autostart: Mutex<Option<Autostart>>,
    /// Cancelled when the secrets in the administrator's files have been taken in.
    taken_in: CancellationToken,
}

impl Service {
    /// Loads what is stored and finds the guests that run. The receiver's first events are one `Event::Domain` per domain;
    /// when they have been flushed, what is published is true.
    /// Errors: `StorageFailed` if the folders cannot be used.
    pub async fn open(
        settings: Settings,
        drivers: Vec<Arc<dyn Driver>>,
        host: Host,
        authority: Arc<dyn Authority>,
        callers: Arc<dyn Callers>,
    ) -> Result<(Arc<Service>, mpsc::UnboundedReceiver<Event>)> {
        let (events, receiver) = Events::channel();
        let store = Store::open(settings.paths)?;
        let domains = Arc::new(Domains::default());
        let images = Images::of(domains.clone());
        let shared = Shared::new(drivers, host, authority, callers, events, images, store, settings.limits);
        let (secrets, pools) = (Arc::new(Secrets::default()), Arc::new(Pools::default()));
        let networks = Arc::new(Networks::default());
        // First what machines may need.
        secret::load(&shared, &secrets).await?;
        storage::load(&shared, &pools).await?;
        network::load(&shared, &networks).await?;
        boot::load(&shared, &domains).await?;
        network::plug_in_guests(&networks);
        let autostart = Mutex::new(Autostart::open(&shared, &networks, &pools, &domains).await?);
        let (node_devices, hosts, taken_in) = (OnceLock::new(), OnceLock::new(), CancellationToken::new());
        Ok((
            Arc::new(Service { shared, domains, secrets, node_devices, hosts, pools, networks, autostart, taken_in }),
            receiver,
        ))
    }

    /// Starts the networks, pools and domains that start with the host, once since it booted, and what may wait for a TPM. To be
    /// called when the bus knows us.
    pub async fn begin_work(&self) -> Result<()> {
        let (shared, secrets, taken_in) =
            (self.shared.clone(), self.secrets.clone(), self.taken_in.clone().drop_guard());
        tokio::spawn(async move {
            secret::take_in_files(&shared, &secrets).await;
            drop(taken_in);
            secret::tell_protection(&shared, &secrets).await;
        });
        let autostart = lock(&self.autostart).take();
        match autostart {
            Some(autostart) => autostart.begin().await,
            None => Ok(()),
        }
    }

    /// Publishes the devices of the host, too, and follows them. To be called once, before anybody is on the bus.
    pub async fn follow_host(&self, host: Arc<dyn HostDevices>) {
        let devices = NodeDevices::open(&self.shared, &self.domains, host).await;
        let _ = self.node_devices.set(devices);
    }

    /// The device of the host with this name.
    pub fn node_device(&self, name: &str) -> Result<Arc<HostDevice>> {
        let devices = self.node_devices.get();
        devices.ok_or_else(|| Error::NoSuchNodeDevice(shorten(name)))?.get(name)
    }

    /// The host of Fibre Channel with these world wide names of node and port.
    pub fn node_device_by_wwn(&self, node: &str, port: &str) -> Result<Arc<HostDevice>> {
        let devices = self.node_devices.get();
        devices.ok_or_else(|| Error::NoSuchNodeDevice(shorten(port)))?.by_wwn(node, port)
    }

    /// Makes a device of the host from its document, a mediated device or a virtual port: it is there when this returns, until it is
    /// ended or the host boots. Errors: `ConfigInvalid`; `NoSuchNodeDevice` names the parent; `OperationInvalid` where it is there
    /// already, or the parent can have no more; `OperationUnsupported` where the parent can have none of that kind.
    pub async fn create_node_device(&self, caller: &Caller, xml: &str) -> Result<Arc<HostDevice>> {
        let (verb, begun) = (&verb::CREATE_NODE_DEVICE, Instant::now());
        let made = async {
            self.allow(caller, verb, &Subject::default()).await?;
            let none =
                || Error::OperationUnsupported("cannot create a node device: the host's are not followed".to_owned());
            self.node_devices.get().ok_or_else(none)?.create(xml).await
        };
        let made = made.await;
        match &made {
            Ok(device) => frames::log_of(&**device, caller, verb, begun, None),
            Err(error) => log::refused(caller, verb, begun, error),
        }
        made
    }

    /// Stores how a device of the host is made. Error: `OperationUnsupported`, as none is stored yet.
    pub async fn define_node_device(&self, caller: &Caller) -> Result<std::convert::Infallible> {
        let verb = &verb::DEFINE_NODE_DEVICE;
        self.allow(caller, verb, &Subject::default()).await?;
        Err(Error::OperationUnsupported(format!("cannot {} a node device: {}", verb.word, nodedev::NOT_STORED)))
    }

    /// The stream of changes.
    pub fn events(&self) -> &Events {
        &self.shared.events
    }

    /// The jobs under way and lately ended.
    pub fn jobs(&self) -> &Arc<Jobs> {
        &self.shared.jobs
    }

    /// The drivers' names.
    pub fn drivers(&self) -> Vec<&'static str> {
        self.shared.drivers.iter().map(|driver| driver.name()).collect()
    }

    /// The domain with this uuid, if there is one.
    pub fn get(&self, uuid: Uuid) -> Option<Arc<Domain>> {
        self.domains.get(uuid)
    }

    /// The domain with this uuid, written with or without dashes.
    pub fn by_uuid(&self, uuid: &str) -> Result<Arc<Domain>> {
        self.get(read_uuid(uuid)?).ok_or_else(|| Error::NoSuchDomain { what: "uuid", value: shorten(uuid) })
    }

    /// The domain with this name.
    pub fn by_name(&self, name: &str) -> Result<Arc<Domain>> {
        let found = self.domains.by_name(name);
        found.ok_or_else(|| Error::NoSuchDomain { what: "name", value: shorten(name) })
    }

    /// The running domain with this id.
    pub fn by_id(&self, id: u32) -> Result<Arc<Domain>> {
        let found = self.domains.all().into_iter().find(|domain| id != 0 && domain.id() == id);
        found.ok_or_else(|| Error::NoSuchDomain { what: "id", value: id.to_string() })
    }

    /// What calling a method of `org.virt.Manager` would meet: `yes`, `no` or `challenge`. Never prompts.
    /// Error: `InvalidArgument` for a name that is none.
    pub async fn can(&self, caller: &Caller, member: &str) -> Result<&'static str> {
        let Some(action) = verb::find("org.virt.Manager", verb::MANAGER, member)?.action else { return Ok("yes") };
        Ok(self.shared.authority.can(caller, action, &Subject::default()).await.as_str())
    }

    /// Asks whether `caller` may do to `subject` what a verb does.
    async fn allow(&self, caller: &Caller, verb: &Verb, subject: &Subject) -> Result<()> {
        match verb.action {
            Some(action) => self.shared.authority.check(caller, action, subject).await,
            None => Ok(()),
        }
    }

    /// The `<capabilities>` document of a driver.
    pub async fn capabilities(&self, driver: &str) -> Result<String> {
        let told = self.driver_named(driver)?.capabilities().await;
        told.map_err(|e| Error::HypervisorFailed { what: format!("driver '{driver}'"), why: e.to_string() })
    }

    /// The `<domainCapabilities>` document of a kind of machine; the first driver's, if none is named.
    pub async fn domain_capabilities(&self, driver: Option<&str>, wanted: &MachineChoice) -> Result<String> {
        let found = match driver {
            Some(name) => self.driver_named(name)?,
            None => {
                let first = self.shared.drivers.first();
                first.ok_or_else(|| Error::OperationUnsupported("this virtd has no drivers".to_owned()))?
            }
        };
        found.domain_capabilities(wanted).await.map_err(|e| match e {
            DriverError::NotPossible(why) => Error::ConfigUnsupported(why),
            DriverError::Unsupported(why) => Error::OperationUnsupported(why),
            e => Error::HypervisorFailed { what: format!("driver '{}'", found.name()), why: e.to_string() },
        })
    }

    fn driver_named(&self, name: &str) -> Result<&Arc<dyn Driver>> {
        self.shared.driver_named(name).ok_or_else(|| {
            let known = self.drivers().join(", ");
            Error::InvalidArgument(format!("there is no driver '{}', only {known}", shorten(name)))
        })
    }

    /// Cancels a job: one's own, or with permission another's.
    pub async fn cancel_job(&self, caller: &Caller, id: u64) -> Result<()> {
        self.with_job(caller, &verb::CANCEL, id, async { self.shared.jobs.cancel(id) }).await
    }

    /// Has a job that is ready finished, one's own or with permission another's; waits for its end if `wait`.
    pub async fn finish_job(&self, caller: &Caller, id: u64, wait: bool) -> Result<()> {
        self.with_job(caller, &verb::FINISH, id, self.shared.jobs.ask_to_finish(id, wait)).await
    }

    /// Does `work` with a job, for whoever has asked for it or may have others' jobs.
    async fn with_job(
        &self,
        caller: &Caller,
        verb: &verb::Verb,
        id: u64,
        work: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        let Some(facts) = self.shared.jobs.facts(id) else {
            return Err(Error::OperationInvalid(format!("there is no job {id}; it may have ended a while ago")));
        };
        let subject = self.subject_of(&facts.object);
        let allowed = async {
            if facts.requester_uid != caller.uid {
                self.allow(caller, verb, &subject).await?;
            }
            work.await
        };
        match facts.object.domain().and_then(|uuid| self.get(uuid)) {
            Some(domain) => domain.logged(caller, verb, allowed).await,
            None => allowed.await,
        }
    }

    /// What polkit is told of an object; nothing of one that has gone.
    fn subject_of(&self, object: &ObjectRef) -> Subject {
        let subject = match object {
            ObjectRef::Domain(uuid) | ObjectRef::Snapshot(uuid, _) => self.get(*uuid).map(|domain| domain.subject()),
            ObjectRef::Secret(uuid) => self.secret(*uuid).map(|secret| secret.subject()),
            ObjectRef::Pool(uuid) => self.pool(*uuid).map(|pool| pool.subject()),
            ObjectRef::Volume(pool, name) => {
                self.pool(*pool).and_then(|pool| pool.volume(name)).map(|volume| volume.subject())
            }
            ObjectRef::Network(uuid) => self.network(*uuid).map(|network| network.subject()),
            ObjectRef::Foreign | ObjectRef::NodeDevice(_) | ObjectRef::Host(_) => None,
        };
        subject.unwrap_or_default()
    }

    /// Lets jobs under way end, for a while (not those that wait for guests' programs), thaws what clients have had frozen, and has
    /// kept what was seen of other hosts. Guests go on.
    pub async fn close(&self) {
        self.shared.jobs.cancel_all(verb::GUEST_EXEC.word);
        let mut thawing = JoinSet::new();
        for domain in self.domains.all() {
            thawing.spawn(async move { domain.thaws_at_the_end().await });
        }
        thawing.join_all().await;
        if let Some(hosts) = self.hosts.get() {
            hosts.close().await;
        }
        if tokio::time::timeout(CLOSING, self.shared.jobs.idle()).await.is_err() {
            tracing::warn!("closing with jobs under way; the next start of virtd finishes or ends them");
        }
    }
}

/// A uuid as callers write it, with or without dashes.
fn read_uuid(text: &str) -> Result<Uuid> {
    let refused = |_| Error::InvalidArgument(format!("'{}' is not a uuid of 32 hexadecimal digits", shorten(text)));
    Uuid::try_parse(text).map_err(refused)
}
