//! Devices of a host that is played: what is told of them, who uses them, what is done to them and refused.

use crate::world::{World, xml};
use async_trait::async_trait;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::mpsc;
use virt_model::device::PciAddress;
use virt_model::driver::DriverError;
use virt_model::driver::host_devices::{DetachedDevice, DeviceNews, HostDevices};
use virt_model::nodedev::{
    About, IommuGroup, Maker, MdevAbout, MdevType, NewDevice, NodeDevice, PciAbout, VFIO, pci_name,
};
use virt_service::authz::{Action, Caller};
use virt_service::error::Error;
use virt_service::events::Event;
use virt_service::facts::ObjectFacts;
use virt_service::{HostDevice, UndefineOptions};

/// A host with one card.
struct Host {
    driver: Mutex<Option<String>>,
    uses: Mutex<Vec<(&'static str, String)>>,
    disks: Mutex<Vec<PathBuf>>,
    /// As many looks at the card are never answered.
    hangs: AtomicUsize,
    /// It does not come to an end of telling what there is.
    tells_on: AtomicBool,
    /// Detaching ends with this; the device has lost its driver by then, unless it is refused.
    fails: Mutex<Option<DriverError>>,
    /// So many times it is not given back.
    stuck: AtomicUsize,
    news: Mutex<Option<mpsc::Sender<DeviceNews>>>,
    /// The mediated device that was made of the card.
    mdev: Mutex<Option<String>>,
}

impl Host {
    fn new(driver: Option<&str>) -> Arc<Host> {
        let driver = Mutex::new(driver.map(str::to_owned));
        let (uses, disks, fails, news) = (Mutex::default(), Mutex::default(), Mutex::default(), Mutex::default());
        Arc::new(Host {
            driver,
            uses,
            disks,
            hangs: AtomicUsize::new(0),
            tells_on: AtomicBool::new(false),
            fails,
            stuck: AtomicUsize::new(0),
            news,
            mdev: Mutex::default(),
        })
    }

    /// A virtual function of the card.
    fn function(&self) -> NodeDevice {
        let address = PciAddress::read("0000:06:10.0").unwrap();
        let about = About::Pci(Box::new(PciAbout { address, ..PciAbout::default() }));
        NodeDevice { name: pci_name(address), sys_path: "/sys/devices/y".into(), about, ..self.card() }
    }

    fn card(&self) -> NodeDevice {
        let address = PciAddress::read("0000:06:00.0").unwrap();
        let functions = (vec![PciAddress::read("0000:06:10.0").unwrap()], 7);
        let group = IommuGroup { number: 7, members: vec![address, PciAddress::read("0000:06:00.1").unwrap()] };
        let available = u32::from(self.mdev.lock().unwrap().is_none());
        let kind = MdevType { id: "t-1".into(), available, ..MdevType::default() };
        let pci = PciAbout {
            address,
            group: Some(group),
            functions,
            mdev_types: vec![kind],
            vfio: true,
            resets: true,
            ..PciAbout::default()
        };
        NodeDevice {
            name: pci_name(address),
            parent: Some("computer".into()),
            sys_path: "/sys/devices/x".into(),
            nodes: Vec::new(),
            driver: self.driver(),
            vendor: Maker::default(),
            product: Maker::default(),
            about: About::Pci(Box::new(pci)),
        }
    }

    fn mediated(&self) -> Option<NodeDevice> {
        let uuid = self.mdev.lock().unwrap().clone()?;
        let about = About::Mdev(MdevAbout { kind: "t-1".into(), uuid, ..MdevAbout::default() });
        Some(NodeDevice {
            name: MDEV.into(),
            parent: Some(CARD.into()),
            sys_path: "/sys/devices/x/m".into(),
            about,
            ..self.card()
        })
    }

    fn driver(&self) -> Option<String> {
        self.driver.lock().unwrap().clone()
    }
}

#[async_trait]
impl HostDevices for Host {
    fn follow(self: Arc<Self>) -> mpsc::Receiver<DeviceNews> {
        let (sender, receiver) = mpsc::channel(8);
        sender.try_send(DeviceNews::Is(Arc::new(self.card()))).unwrap();
        if !self.tells_on.load(Ordering::Relaxed) {
            sender.try_send(DeviceNews::AllTold).unwrap();
        }
        *self.news.lock().unwrap() = Some(sender);
        receiver
    }

    async fn read(&self, name: &str) -> Result<Option<NodeDevice>, DriverError> {
        if self.hangs.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |hangs| hangs.checked_sub(1)).is_ok() {
            std::future::pending::<()>().await;
        }
        Ok([Some(self.card()), self.mediated()].into_iter().flatten().find(|device| &*device.name == name))
    }

    async fn host_uses(&self, _: &NodeDevice) -> Result<Vec<(&'static str, String)>, DriverError> {
        Ok(self.uses.lock().unwrap().clone())
    }

    async fn disks(&self, _: &NodeDevice) -> Result<Vec<PathBuf>, DriverError> {
        Ok(self.disks.lock().unwrap().clone())
    }

    async fn detach(&self, _: &NodeDevice) -> Result<(), DriverError> {
        let fails = self.fails.lock().unwrap().take();
        match fails {
            Some(error) => {
                if !matches!(error, DriverError::Refused(_)) {
                    *self.driver.lock().unwrap() = None;
                }
                Err(error)
            }
            None => {
                *self.driver.lock().unwrap() = Some(VFIO.to_owned());
                Ok(())
            }
        }
    }

    async fn reattach(&self, _: &NodeDevice, before: Option<&DetachedDevice>) -> Result<(), DriverError> {
        if self.stuck.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |stuck| stuck.checked_sub(1)).is_ok() {
            return Err(DriverError::Hypervisor("the kernel is at it still".into()));
        }
        let driver = before.map_or(Some("found".to_owned()), |before| before.driver.clone());
        *self.driver.lock().unwrap() = driver;
        Ok(())
    }

    async fn reset(&self, _: &NodeDevice) -> Result<(), DriverError> {
        Ok(())
    }

    async fn make(&self, _: &NodeDevice, new: &NewDevice) -> Result<(Arc<str>, Vec<DeviceNews>), DriverError> {
        if let Some(error) = self.fails.lock().unwrap().take() {
            return Err(error);
        }
        let NewDevice::Mdev { uuid, .. } = new else { panic!("{new:?}") };
        *self.mdev.lock().unwrap() = Some(uuid.to_string());
        let made = self.mediated().expect("made");
        Ok((made.name.clone(), vec![DeviceNews::Is(Arc::new(made))]))
    }

    async fn end(&self, device: &NodeDevice) -> Result<Vec<DeviceNews>, DriverError> {
        self.mdev.lock().unwrap().take().expect("it is there");
        Ok(vec![DeviceNews::Gone(device.name.clone())])
    }
}

const CARD: &str = "pci_0000_06_00_0";
const MDEV: &str = "mdev_made";

async fn world(folder: &Path, host: &Arc<Host>) -> (World, Arc<HostDevice>) {
    let world = World::open(folder).await;
    world.service.follow_host(host.clone()).await;
    let card = world.service.node_device(CARD).expect("it is told by now");
    (world, card)
}

fn note(folder: &Path) -> std::path::PathBuf {
    folder.join(format!("run/detached/{CARD}.json"))
}

/// What has been told of devices: their events, or `=` where only properties changed.
fn told(world: &mut World) -> Vec<String> {
    let mut told = Vec::new();
    while let Ok(event) = world.events.try_recv() {
        if let Event::Object(ObjectFacts::NodeDevice(facts), events)
        | Event::ObjectGone(ObjectFacts::NodeDevice(facts), events) = event
        {
            let word = events.first().map_or("=", |(word, _)| word);
            let driver = facts.device.driver.clone().unwrap_or_default();
            told.push(format!("{word} {driver} {}", facts.users.len()));
        }
    }
    told
}

#[tokio::test]
async fn a_device_is_detached_and_given_back_with_what_it_was_on_disk() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Host::new(Some("e1000e")));
    let (mut world, card) = world(folder.path(), &host).await;
    let alice = world.alice();
    assert_eq!(card.can(&alice, "Detach").await.unwrap(), "yes");
    assert_eq!(card.can(&alice, "Reattach").await.unwrap(), "na");
    assert_eq!(card.can(&alice, "Destroy").await.unwrap(), "na");
    assert!(card.xml(&alice).await.unwrap().contains("<name>pci_0000_06_00_0</name>"));
    let driven = card.reset(&alice).await.unwrap_err().to_string();
    assert!(driven.contains("'e1000e' has it; detach it first"), "{driven}");
    let odd = card.detach(&alice, Some("xen")).await.unwrap_err();
    assert!(matches!(odd, Error::InvalidArgument(_)), "{odd}");
    card.detach(&alice, None).await.unwrap();
    assert_eq!(host.driver().as_deref(), Some(VFIO));
    assert!(note(folder.path()).exists());
    let again = card.detach(&alice, None).await.unwrap_err();
    assert!(matches!(again, Error::OperationInvalid(_)) && again.to_string().contains("detached already"), "{again}");
    card.reset(&alice).await.unwrap();
    card.reattach(&alice).await.unwrap();
    assert_eq!(host.driver().as_deref(), Some("e1000e"));
    assert!(!note(folder.path()).exists());
    assert_eq!(told(&mut world), ["created e1000e 0", "updated vfio-pci 0", "updated e1000e 0"]);
    let asked = world.notary.asked.lock().unwrap();
    let (action, subject) = asked.last().unwrap();
    assert_eq!((*action, subject.detail("device_name")), (Action::DeviceDetach, CARD));
}

#[tokio::test]
async fn what_the_host_or_a_guest_has_is_not_taken_away() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Host::new(Some("e1000e")));
    let (mut world, card) = world(folder.path(), &host).await;
    let alice = world.alice();
    *host.uses.lock().unwrap() = vec![("mount", "/".to_owned()), ("route", "default via eth0".to_owned())];
    let why = card.detach(&alice, None).await.unwrap_err();
    assert!(matches!(why, Error::InUse(_)), "{why}");
    assert!(why.to_string().contains("would lose the mount /, the route default via eth0"), "{why}");
    let check = card.check_detach(&alice, None).await.unwrap();
    assert!(matches!(check.refusal, Some(Error::InUse(_))) && check.host_uses.len() == 2);
    assert!(check.siblings.is_empty(), "the other is not there");
    host.uses.lock().unwrap().clear();
    assert!(card.check_detach(&alice, None).await.unwrap().refusal.is_none());

    let hostdev = "<devices><hostdev type='pci' managed='yes'><source><address bus='6'/></source></hostdev></devices>";
    let domain = world.service.define(&alice, &xml("web", hostdev), false).await.unwrap();
    let users = async |how: &'static str| {
        while !card.facts().users.iter().any(|user| user.how.as_str() == how) {
            tokio::task::yield_now().await;
        }
    };
    users("config").await;
    world.start(&domain).await.unwrap();
    users("live").await;
    let why = card.detach(&alice, None).await.unwrap_err();
    assert!(matches!(why, Error::InUse(_)) && why.to_string().contains("domain 'web' has it"), "{why}");
    *host.driver.lock().unwrap() = Some(VFIO.to_owned());
    let news = host.news.lock().unwrap().clone().unwrap();
    news.send(DeviceNews::Is(Arc::new(host.card()))).await.unwrap();
    while !card.facts().device.detached() {
        tokio::task::yield_now().await;
    }
    for why in [card.reattach(&alice).await.unwrap_err(), card.reset(&alice).await.unwrap_err()] {
        assert!(matches!(why, Error::InUse(_)) && why.to_string().contains("domain 'web' has it"), "{why}");
    }
    assert!(!note(folder.path()).exists());
    news.send(DeviceNews::Gone(CARD.into())).await.unwrap();
    while world.service.node_device(CARD).is_ok() {
        tokio::task::yield_now().await;
    }
    let gone = card.xml(&alice).await.unwrap_err();
    assert!(matches!(gone, Error::NoSuchNodeDevice(_)), "{gone}");
    assert_eq!(told(&mut world).last().unwrap(), "deleted vfio-pci 2", "live and stored");
}

#[tokio::test]
async fn what_guests_have_of_a_card_is_not_taken_with_it() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Host::new(Some("e1000e")));
    let (world, card) = world(folder.path(), &host).await;
    let alice = world.alice();
    let news = host.news.lock().unwrap().clone().unwrap();
    news.send(DeviceNews::Is(Arc::new(host.function()))).await.unwrap();
    let below = NodeDevice {
        name: "usb_1_1".into(),
        sys_path: "/sys/devices/x/usb1/1-1".into(),
        about: About::UsbDevice { bus: 1, device: 4, hub: false },
        ..host.card()
    };
    news.send(DeviceNews::Is(Arc::new(below))).await.unwrap();
    *host.disks.lock().unwrap() = vec!["/dev/of-the-card".into()];
    let parts = [
        ("pci_0000_06_10_0", "<hostdev type='pci'><source><address bus='6' slot='0x10'/></source></hostdev>"),
        ("usb_1_1", "<hostdev type='usb'><source><address bus='1' device='4'/></source></hostdev>"),
        ("", "<disk type='block'><source dev='/dev/of-the-card'/><target dev='vda'/></disk>"),
    ];
    let until = async |device: &str, lives: bool| {
        let live = || {
            let users = world.service.node_device(device).map(|one| one.facts().users.clone()).unwrap_or_default();
            users.iter().any(|user| user.how.as_str() == "live")
        };
        while !device.is_empty() && live() != lives {
            tokio::task::yield_now().await;
        }
    };
    for (device, part) in parts {
        let devices = format!("<devices>{part}</devices>");
        let domain = world.service.define(&alice, &xml("web", &devices), false).await.expect(part);
        assert!(card.check_detach(&alice, None).await.unwrap().refusal.is_none(), "it does not run: {part}");
        world.start(&domain).await.expect(part);
        until(device, true).await;
        let check = card.check_detach(&alice, None).await.unwrap();
        assert!(check.users.iter().any(|user| user.how.as_str() == "live"), "{part}: {:?}", check.users);
        let why = card.detach(&alice, None).await.expect_err(part);
        assert!(matches!(why, Error::InUse(_)) && why.to_string().contains("domain 'web' has it or what"), "{why}");
        domain.destroy(&alice, false).await.unwrap();
        domain.undefine(&alice, UndefineOptions::default()).await.unwrap();
        until(device, false).await;
    }
    assert_eq!(host.driver().as_deref(), Some("e1000e"));
}

#[tokio::test]
async fn a_mediated_device_is_made_told_of_and_ended_unless_a_machine_has_it() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Host::new(Some("e1000e")));
    let (mut world, card) = world(folder.path(), &host).await;
    let alice = world.alice();
    let of = |kind: &str, parent: &str| {
        format!(
            "<device><parent>{parent}</parent><capability type='mdev'><type id='{kind}'/>\
             <uuid>c2177883-f1bb-47f0-914d-32a22e3a8804</uuid></capability></device>"
        )
    };
    let service = world.service.clone();
    let refused = async |xml: &str| service.create_node_device(&alice, xml).await.err().expect("refused");
    assert!(matches!(refused("<device/>").await, Error::ConfigInvalid(_)));
    let none = refused(&of("t-1", "pci_none")).await;
    assert!(matches!(&none, Error::NoSuchNodeDevice(name) if name == "pci_none"), "{none}");
    let kind = refused(&of("t-2", CARD)).await;
    assert!(matches!(&kind, Error::OperationUnsupported(why) if why.ends_with("it has types: t-1")), "{kind}");
    let port = "<device><capability type='scsi_host'><capability type='fc_host'><wwnn>20000000c9831b4b</wwnn>\
                <wwpn>20000000c9831b4b</wwpn></capability></capability></device>";
    assert!(matches!(refused(port).await, Error::NoSuchNodeDevice(_)));
    *host.fails.lock().unwrap() = Some(DriverError::Hypervisor("the kernel says no".into()));
    let failed = refused(&of("t-1", CARD)).await;
    assert!(matches!(&failed, Error::HypervisorFailed { .. }) && failed.to_string().contains("says no"), "{failed}");
    assert!(world.service.node_device(MDEV).is_err());

    let made = world.service.create_node_device(&alice, &of("t-1", CARD)).await.unwrap();
    assert_eq!((&**made.name(), made.can(&alice, "Destroy").await.unwrap()), (MDEV, "yes"));
    assert_eq!(told(&mut world), ["created e1000e 0", "created e1000e 0"]);
    let again = refused(&of("t-1", CARD)).await;
    assert!(matches!(&again, Error::OperationInvalid(why) if why.contains("is there already")), "{again}");
    let full = refused(&of("t-1", CARD).replace("c2177883", "d2177883")).await;
    assert!(matches!(&full, Error::OperationInvalid(why) if why.contains("no more devices")), "{full}");
    let card = card.destroy(&alice).await.unwrap_err();
    assert!(matches!(card, Error::OperationUnsupported(_)), "{card}");

    let hostdev = "<devices><hostdev type='mdev' model='vfio-pci'><source>\
                   <address uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'/></source></hostdev></devices>";
    let domain = world.service.define(&alice, &xml("web", hostdev), false).await.unwrap();
    world.start(&domain).await.unwrap();
    while !made.facts().users.iter().any(|user| user.how.as_str() == "live") {
        tokio::task::yield_now().await;
    }
    let why = made.destroy(&alice).await.unwrap_err();
    assert!(matches!(why, Error::InUse(_)) && why.to_string().contains("domain 'web' has it"), "{why}");
    domain.destroy(&alice, false).await.unwrap();
    while made.facts().users.iter().any(|user| user.how.as_str() == "live") {
        tokio::task::yield_now().await;
    }
    made.destroy(&alice).await.unwrap();
    assert!(world.service.node_device(MDEV).is_err());
    assert!(told(&mut world).last().unwrap().starts_with("deleted"));
}

#[tokio::test]
async fn what_fails_on_the_way_is_undone() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Host::new(Some("e1000e")));
    let (world, card) = world(folder.path(), &host).await;
    *host.fails.lock().unwrap() = Some(DriverError::Hypervisor("the kernel says no".into()));
    let why = card.detach(&world.alice(), None).await.unwrap_err().to_string();
    assert!(why.contains("the kernel says no"), "{why}");
    assert_eq!(host.driver().as_deref(), Some("e1000e"), "it has its driver again");
    *host.fails.lock().unwrap() = Some(DriverError::Refused("IOMMU group 7 is in use by domain 'web'".into()));
    let why = card.detach(&world.alice(), None).await.unwrap_err();
    assert!(matches!(why, Error::InUse(_)), "{why}");
    assert!(!note(folder.path()).exists());
}

#[tokio::test]
async fn what_cannot_be_undone_at_once_is_undone_before_the_next_verb() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Host::new(Some("e1000e")));
    let (world, card) = world(folder.path(), &host).await;
    let noted = || std::fs::read_to_string(note(folder.path())).unwrap();
    *host.fails.lock().unwrap() = Some(DriverError::TimedOut("the kernel has not done with it".into()));
    host.stuck.store(2, Ordering::Relaxed);
    card.detach(&world.alice(), None).await.unwrap_err();
    assert!(host.driver().is_none() && noted().contains("e1000e"));
    card.detach(&world.alice(), None).await.unwrap_err();
    assert!(host.driver().is_none() && noted().contains("e1000e"), "it cannot be undone yet");
    card.detach(&world.alice(), None).await.unwrap();
    assert!(host.driver().as_deref() == Some(VFIO) && noted().contains("e1000e"), "what it was is not forgotten");
    card.reattach(&world.alice()).await.unwrap();
    assert_eq!(host.driver().as_deref(), Some("e1000e"));
}

#[tokio::test]
async fn a_detaching_that_was_cut_off_is_undone_and_what_is_detached_stays_so() {
    for (driver, noted, now) in
        [(None, true, Some("e1000e")), (Some(VFIO), true, Some(VFIO)), (Some("igb"), false, Some("igb"))]
    {
        let (folder, host) = (tempfile::tempdir().unwrap(), Host::new(driver));
        std::fs::create_dir_all(note(folder.path()).parent().unwrap()).unwrap();
        if noted {
            std::fs::write(note(folder.path()), r#"{"driver":"e1000e"}"#).unwrap();
        }
        let (_world, card) = world(folder.path(), &host).await;
        assert_eq!(host.driver().as_deref(), now);
        assert_eq!(card.facts().device.driver.as_deref(), now);
        assert_eq!(note(folder.path()).exists(), now == Some(VFIO));
    }
}

#[tokio::test]
async fn what_was_cut_off_is_undone_before_anything_else_is_done_to_the_device() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Host::new(None));
    std::fs::create_dir_all(note(folder.path()).parent().unwrap()).unwrap();
    std::fs::write(note(folder.path()), r#"{"driver":"e1000e"}"#).unwrap();
    host.tells_on.store(true, Ordering::Relaxed);
    let world = World::open(folder.path()).await;
    tokio::time::pause();
    world.service.follow_host(host.clone()).await;
    let card = world.service.node_device(CARD).expect("it is told by now");
    assert_eq!(host.driver(), None, "not all are told");
    card.detach(&world.alice(), None).await.unwrap();
    let noted = std::fs::read_to_string(note(folder.path())).unwrap();
    assert!(noted.contains("e1000e"), "what it was once, and not in between: {noted}");
    let news = host.news.lock().unwrap().clone().unwrap();
    news.send(DeviceNews::AllTold).await.unwrap();
    news.send(DeviceNews::Gone(CARD.into())).await.unwrap();
    while world.service.node_device(CARD).is_ok() {
        tokio::task::yield_now().await;
    }
    assert_eq!(host.driver().as_deref(), Some(VFIO));
    assert!(note(folder.path()).exists());
}

#[tokio::test]
async fn a_device_that_does_not_answer_keeps_only_those_who_ask_for_it() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Host::new(Some("e1000e")));
    let (world, card) = world(folder.path(), &host).await;
    let (alice, bob) = (world.alice(), Caller { uid: 1001, ..world.alice() });
    host.hangs.store(2, Ordering::Relaxed);
    tokio::time::pause();
    for _ in 0..4 {
        let late = card.xml(&alice).await.unwrap_err();
        assert!(matches!(late, Error::TimedOut(_)), "{late}");
    }
    assert!(matches!(card.check_detach(&alice, None).await.unwrap_err(), Error::TimedOut(_)));
    assert_eq!(host.hangs.load(Ordering::Relaxed), 0, "two have been begun, and no more");
    card.xml(&bob).await.unwrap();
}

#[tokio::test]
async fn whoever_may_not_is_told_nothing() {
    let (folder, host) = (tempfile::tempdir().unwrap(), Host::new(Some("e1000e")));
    let (world, card) = world(folder.path(), &host).await;
    world.notary.refuses.store(true, Ordering::Relaxed);
    *host.uses.lock().unwrap() = vec![("mount", "/secret".to_owned())];
    let alice = world.alice();
    for refused in [
        card.detach(&alice, None).await,
        card.reattach(&alice).await,
        card.reset(&alice).await,
        card.destroy(&alice).await,
        world.service.create_node_device(&alice, "<device/>").await.map(drop),
    ] {
        assert!(matches!(refused, Err(Error::AccessDenied(_))), "{refused:?}");
    }
    assert!(matches!(card.check_detach(&alice, None).await, Err(Error::AccessDenied(_))));
    assert!(matches!(card.xml(&alice).await, Err(Error::AccessDenied(_))));
    assert_eq!(host.driver().as_deref(), Some("e1000e"));
}
