//! The devices of the host: which there are and who uses them. What is done to one is in `verbs.rs`.
//!
//! The driver tells what comes, goes and changes; who uses what follows from what machines are made of. Lists are locked over
//! a device's state, never the other way round, and no domain's state is looked at under either.

mod made;
mod verbs;

pub use verbs::DetachCheck;
pub(crate) use verbs::NOT_STORED;

use crate::authz::{Action, Subject};
use crate::domain::Domains;
use crate::error::{Error, Result};
use crate::events::{Event, Happened};
use crate::facts::{NodeDeviceFacts, ObjectFacts};
use crate::fair::FairPlaces;
use crate::frames::{self, Changeable};
use crate::lock::lock;
use crate::object::{ObjectKind, ObjectRef, Usage, User};
use crate::shared::Shared;
use crate::store::on_disk;
use crate::turn::Turn;
use crate::verb::{Verb, When};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::driver::host_devices::{DetachedDevice, DeviceNews, HostDevices};
use virt_model::nodedev::{DeviceWish, NodeDevice};
use virt_model::xml::shorten;

/// How long virtd's start waits for the devices of the host.
const LOOK: Duration = Duration::from_secs(2);

/// As many looks at devices are under way for all who only read, and for one user.
const LOOKS: (usize, usize) = (64, 2);

/// See the module.
pub(crate) struct NodeDevices {
    shared: Arc<Shared>,
    domains: Arc<Domains>,
    host: Arc<dyn HostDevices>,
    all: Mutex<BTreeMap<Arc<str>, Arc<HostDevice>>>,
    /// Who has devices looked at, by user.
    looks: Arc<FairPlaces<u32>>,
    /// What was noted of devices before this virtd, and is not looked after yet.
    cut_off: Mutex<BTreeMap<Arc<str>, DetachedDevice>>,
}

/// A device of the host, as long as it is there.
pub struct HostDevice {
    name: Arc<str>,
    shared: Arc<Shared>,
    devices: Weak<NodeDevices>,
    turn: Arc<Turn>,
    state: Mutex<DeviceState>,
}

/// What a device is at a moment.
struct DeviceState {
    facts: Arc<NodeDeviceFacts>,
    gone: bool,
}

/// A device that a machine wants.
struct Wanted {
    domain: Uuid,
    wish: DeviceWish,
    how: Usage,
}

impl NodeDevices {
    /// Those that the host has; what is not told soon comes later.
    pub async fn open(shared: &Arc<Shared>, domains: &Arc<Domains>, host: Arc<dyn HostDevices>) -> Arc<NodeDevices> {
        let (shared, domains) = (shared.clone(), domains.clone());
        // Before anybody can have another device detached.
        let store = shared.clone();
        let noted = on_disk(move || Ok(store.store.detached_devices())).await.unwrap_or_default();
        let devices = Arc::new(NodeDevices {
            shared,
            domains,
            host,
            all: Mutex::default(),
            looks: FairPlaces::new(LOOKS.0, LOOKS.1),
            cut_off: Mutex::new(noted.into_iter().collect()),
        });
        let (told, is_told) = oneshot::channel();
        tokio::spawn(devices.clone().follow(told));
        let _ = timeout(LOOK, is_told).await;
        devices
    }

    async fn follow(self: Arc<Self>, told: oneshot::Sender<()>) {
        let mut configurations = self.shared.configurations.subscribe();
        let (mut news, mut told) = (self.host.clone().follow(), Some(told));
        loop {
            tokio::select! {
                one = news.recv() => match one {
                    Some(DeviceNews::AllTold) => {
                        if let Some(told) = told.take() {
                            tokio::spawn(self.clone().recover(told));
                        }
                    }
                    Some(one) => self.hears(one),
                    // Whoever wanted to know when all are told waits no longer either.
                    None => break,
                },
                changed = configurations.changed() => match changed {
                    Ok(()) => self.users_may_have_changed(),
                    Err(_) => break,
                },
            }
        }
        drop(told);
        while configurations.changed().await.is_ok() {
            self.users_may_have_changed();
        }
    }

    /// What has become of a device, whoever tells it first.
    fn hears(self: &Arc<Self>, news: DeviceNews) {
        match news {
            DeviceNews::Is(device) => self.is(device),
            DeviceNews::Gone(name) => self.has_gone(&name),
            DeviceNews::AllTold => {}
        }
    }

    /// The device of that name.
    pub fn get(&self, name: &str) -> Result<Arc<HostDevice>> {
        let found = lock(&self.all).get(name).cloned();
        found.ok_or_else(|| Error::NoSuchNodeDevice(shorten(name)))
    }

    /// The host of Fibre Channel with these world wide names.
    pub fn by_wwn(&self, node: &str, port: &str) -> Result<Arc<HostDevice>> {
        let found = self.find(|device| {
            let facts = device.facts();
            let own = facts.device.fibre();
            own.is_some_and(|own| own.0.eq_ignore_ascii_case(node) && own.1.eq_ignore_ascii_case(port))
        });
        let words = || format!("of world wide names {}, {}", shorten(node), shorten(port));
        found.ok_or_else(|| Error::NoSuchNodeDevice(words()))
    }

    /// The first that is so, by name.
    fn find(&self, is_it: impl Fn(&Arc<HostDevice>) -> bool) -> Option<Arc<HostDevice>> {
        lock(&self.all).values().find(|device| is_it(device)).cloned()
    }

    /// Who would lose something with a device: who wants it, what is below it or one of its virtual functions, or has a disk there.
    async fn users_with(&self, device: &NodeDevice) -> Result<Arc<[User]>, DriverError> {
        let mut users: Vec<User> = self.going_with(device).iter().flat_map(|one| one.facts().users.to_vec()).collect();
        let disks = self.host.disks(device).await?;
        if !disks.is_empty() {
            let images = self.shared.image_users.images_below(Path::new("/dev"));
            let files: Vec<PathBuf> = images.iter().map(|(file, _)| file.clone()).collect();
            let meant = self.shared.images.among(&files, &disks).await;
            users.extend(images.into_iter().filter(|(file, _)| meant.contains(file)).flat_map(|(_, users)| users));
        }
        users.sort();
        users.dedup();
        Ok(users.into())
    }

    /// All that would go with a device, as sysfs has it.
    fn going_with(&self, device: &NodeDevice) -> Vec<Arc<HostDevice>> {
        let all = lock(&self.all);
        let path = |one: &Arc<HostDevice>| PathBuf::from(&one.facts().device.sys_path);
        let mut above: Vec<PathBuf> =
            device.with_functions().iter().filter_map(|name| all.get(name)).map(path).collect();
        above.push(PathBuf::from(&device.sys_path));
        let goes = |one: &&Arc<HostDevice>| {
            let path = path(one);
            above.iter().any(|above| !above.as_os_str().is_empty() && path.starts_with(above))
        };
        all.values().filter(goes).cloned().collect()
    }

    /// Those with these names that are there.
    fn there(&self, names: impl Iterator<Item = Arc<str>>) -> Vec<Arc<str>> {
        let all = lock(&self.all);
        names.filter(|name| all.contains_key(name)).collect()
    }

    fn is(self: &Arc<Self>, device: Arc<NodeDevice>) {
        let users = users_of(&device, &self.wanted());
        let mut all = lock(&self.all);
        if let Some(known) = all.get(&device.name) {
            return known.tell(device, Some(users));
        }
        let name = device.name.clone();
        let facts = Arc::new(NodeDeviceFacts { device, users });
        self.shared.events.send(Event::Object(ObjectFacts::NodeDevice(facts.clone()), vec![("created", "")]));
        let state = Mutex::new(DeviceState { facts, gone: false });
        let (shared, devices) = (self.shared.clone(), Arc::downgrade(self));
        all.insert(name.clone(), Arc::new(HostDevice { name, shared, devices, turn: Arc::default(), state }));
    }

    fn has_gone(&self, name: &str) {
        let mut all = lock(&self.all);
        let Some(device) = all.remove(name) else { return };
        let mut state = lock(&device.state);
        state.gone = true;
        let facts = ObjectFacts::NodeDevice(state.facts.clone());
        self.shared.events.send(Event::ObjectGone(facts, vec![("deleted", "")]));
    }

    /// All devices that machines want.
    fn wanted(&self) -> Vec<Wanted> {
        let mut all = Vec::new();
        for domain in self.domains.all() {
            let facts = domain.facts();
            let now = if facts.id != 0 { Usage::Live } else { Usage::Config };
            let stored = facts.stored.as_ref().map(|stored| (stored, Usage::Config));
            for (config, how) in [(&facts.config, now)].into_iter().chain(stored) {
                let wishes = config.wishes.iter();
                all.extend(wishes.map(|wish| Wanted { domain: facts.uuid, wish: wish.clone(), how }));
            }
        }
        all
    }

    fn users_may_have_changed(&self) {
        let wanted = self.wanted();
        for device in lock(&self.all).values() {
            let facts = device.facts();
            if !(wanted.is_empty() && facts.users.is_empty()) {
                device.tell(facts.device.clone(), Some(users_of(&facts.device, &wanted)));
            }
        }
    }

    /// Looks after what was cut off when virtd was killed, a device at a time; `told` goes when that is done.
    async fn recover(self: Arc<Self>, told: oneshot::Sender<()>) {
        let names: Vec<Arc<str>> = lock(&self.cut_off).keys().cloned().collect();
        for name in names {
            let done = match self.get(&name) {
                Ok(device) => device.recover().await,
                // It has gone.
                Err(_) => {
                    lock(&self.cut_off).remove(&name);
                    let (shared, name) = (self.shared.clone(), name.clone());
                    on_disk(move || shared.store.forget_detached(&name)).await
                }
            };
            if let Err(error) = done {
                tracing::error!(device = %name, %error, "its detaching was cut off, and the host cannot have it again");
            }
        }
        drop(told);
    }
}

/// Who of those wants the device.
fn users_of(device: &NodeDevice, wanted: &[Wanted]) -> Arc<[User]> {
    let meant = wanted.iter().filter(|wanted| wanted.wish.means(device));
    let mut users: Vec<User> = meant
        .map(|one| User { object: ObjectRef::Domain(one.domain), place: one.wish.place.to_string(), how: one.how })
        .collect();
    users.sort();
    users.dedup();
    users.into()
}

impl HostDevice {
    /// Its name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// All that is published of it, as last told.
    pub fn facts(&self) -> Arc<NodeDeviceFacts> {
        lock(&self.state).facts.clone()
    }

    /// Tells what is otherwise now.
    fn tell(&self, device: Arc<NodeDevice>, users: Option<Arc<[User]>>) {
        let mut state = lock(&self.state);
        let users = users.unwrap_or_else(|| state.facts.users.clone());
        let facts = NodeDeviceFacts { device, users };
        if state.gone || facts == *state.facts {
            return;
        }
        let events: Vec<Happened> = if facts.device == state.facts.device { Vec::new() } else { vec![("updated", "")] };
        state.facts = Arc::new(facts);
        self.shared.events.send(Event::Object(ObjectFacts::NodeDevice(state.facts.clone()), events));
    }

    fn only_reads(&self) -> Option<&'static str> {
        self.devices().ok()?.host.only_reads()
    }

    fn devices(&self) -> Result<Arc<NodeDevices>> {
        // They go with virtd.
        self.devices.upgrade().ok_or_else(|| Error::NoSuchNodeDevice(self.name.to_string()))
    }

    async fn recover(self: &Arc<Self>) -> Result<()> {
        let _turn = frames::take_turn(&**self, "recover", &CancellationToken::new()).await?;
        self.recovers().await
    }

    /// Its detaching has neither come to its end nor been undone: it is looked after before anything else is done to it.
    fn is_cut_off(&self, before: DetachedDevice) -> Result<()> {
        lock(&self.devices()?.cut_off).insert(self.name.clone(), before);
        Ok(())
    }

    /// Reads it anew, and tells what is otherwise; what has gone is told by who follows.
    async fn look_again(&self) {
        let Ok(devices) = self.devices() else { return };
        if let Ok(Some(device)) = devices.host.read(&self.name).await {
            self.tell(Arc::new(device), None);
        }
    }
}

impl Changeable for HostDevice {
    const KIND: ObjectKind = ObjectKind::NodeDevice;

    fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn turn(&self) -> &Arc<Turn> {
        &self.turn
    }

    fn reference(&self) -> ObjectRef {
        ObjectRef::NodeDevice(self.name.clone())
    }

    fn name(&self) -> String {
        self.name.to_string()
    }

    fn subject(&self) -> Subject {
        Subject::default().with("device_name", &*self.name)
    }

    fn still_here(&self) -> Result<()> {
        if lock(&self.state).gone { Err(Error::NoSuchNodeDevice(self.name.to_string())) } else { Ok(()) }
    }

    fn sound_for(&self, _: Action) -> Result<()> {
        Ok(())
    }

    /// What was being detached when virtd was killed goes back to the host; what was detached stays so.
    async fn recovers(self: &Arc<Self>) -> Result<()> {
        let devices = self.devices()?;
        let noted = lock(&devices.cut_off).remove(&self.name);
        let Some(before) = noted else { return Ok(()) };
        let done = self.undo(&before).await;
        if done.is_err() {
            lock(&devices.cut_off).insert(self.name.clone(), before);
        }
        done
    }

    fn applies(&self, verb: &Verb) -> Result<()> {
        self.applies_to(&self.facts().device, verb)
    }
}

impl HostDevice {
    fn applies_to(&self, device: &NodeDevice, verb: &Verb) -> Result<()> {
        let cannot = |why: &str| format!("cannot {} node device '{}': {why}", verb.word, self.name);
        match verb.when {
            When::Made if !device.is_made() => {
                let why = "only mediated devices and virtual ports are made, and can be ended";
                Err(Error::OperationUnsupported(cannot(why)))
            }
            When::Undriven | When::Detached | When::NotDetached if device.pci().is_none() => {
                let why = "only PCI devices are taken from the host's drivers; others are handed over as they are";
                Err(Error::OperationUnsupported(cannot(why)))
            }
            When::Undriven | When::Detached | When::NotDetached | When::Made if self.only_reads().is_some() => {
                Err(Error::OperationUnsupported(cannot(self.only_reads().unwrap_or_default())))
            }
            When::Detached if !device.detached() => Err(Error::OperationInvalid(cannot("it is not detached"))),
            When::NotDetached if device.detached() => Err(Error::OperationInvalid(cannot("it is detached already"))),
            When::Undriven if !device.detached() && device.driver.is_some() => {
                let driver = device.driver.as_deref().unwrap_or_default();
                Err(Error::OperationInvalid(cannot(&format!("the host's driver '{driver}' has it; detach it first"))))
            }
            _ => Ok(()),
        }
    }
}
