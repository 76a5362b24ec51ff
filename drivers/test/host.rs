//! A host in memory that keeps its machines by itself, to which [`TestConnection`] leads. It outlives whoever mirrors it.
//!
//! [`TestHost`] is also its other side, for tests: what somebody else does to its machines, and what becomes of the connection.

use crate::mirror::{Deed, Picture, Remote, Run, Which};
use async_trait::async_trait;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::inventory::{Ability, Key, Seen};
use virt_model::lock::lock;

/// What its machines are, but for their names.
const BLANK: &str =
    "<domain type='test'><name>blank</name><memory unit='MiB'>64</memory><os><type>hvm</type></os></domain>";

/// The host. Clones are the same one.
#[derive(Clone)]
pub struct TestHost(Arc<House>);

/// A connection to it.
pub struct TestConnection {
    host: TestHost,
    /// How many changes it has been told of.
    told: Mutex<u64>,
}

struct House {
    machines: Mutex<Machines>,
    /// Counts what has changed.
    changes: watch::Sender<u64>,
    line: watch::Sender<Line>,
    abilities: Vec<Ability>,
}

#[derive(Default)]
struct Machines {
    all: BTreeMap<Key, Machine>,
    /// How many there have been.
    made: u32,
    /// How often one was started.
    starts: u64,
}

struct Machine {
    def: Arc<DomainDef>,
    run: Run,
    mark: Option<u64>,
    resets: u32,
}

/// What becomes of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    Answers,
    /// They are not answered.
    Hangs,
    /// They fail at once.
    Cut,
}

impl Default for TestHost {
    fn default() -> Self {
        use Ability::{Reboot, Rename, Reset, Shutdown, Start, Suspend};
        TestHost::with_abilities(&[Start, Shutdown, Reboot, Reset, Suspend, Rename])
    }
}

impl TestHost {
    /// One without machines that can do no more than this.
    pub fn with_abilities(abilities: &[Ability]) -> TestHost {
        TestHost(Arc::new(House {
            machines: Mutex::default(),
            changes: watch::Sender::default(),
            line: watch::Sender::new(Line::Answers),
            abilities: abilities.to_vec(),
        }))
    }

    /// One that has a machine `test`, which runs.
    pub fn with_a_machine() -> TestHost {
        let host = TestHost::default();
        let key = host.create(Uuid::from_u128(0x6695_eb01_f6a4_8304_79aa_97f2_502e_193f), "test");
        host.start(&key);
        host
    }

    /// A connection to it, for [`Mirror`](crate::mirror::Mirror).
    pub fn connection(&self) -> TestConnection {
        TestConnection { host: self.clone(), told: Mutex::default() }
    }

    /// Somebody makes a machine.
    pub fn create(&self, uuid: Uuid, name: &str) -> Key {
        self.changes(|machines| {
            machines.made += 1;
            let key = Key(format!("vm-{}", machines.made).into());
            machines.all.insert(key.clone(), Machine::new(uuid, name));
            key
        })
    }

    /// Somebody gives a machine another name.
    pub fn rename(&self, key: &Key, name: &str) {
        self.machine(key, |machine| name.clone_into(&mut Arc::make_mut(&mut machine.def).name));
    }

    /// Somebody gives a machine another title.
    pub fn set_title(&self, key: &Key, title: &str) {
        self.machine(key, |machine| Arc::make_mut(&mut machine.def).title = Some(title.to_owned()));
    }

    /// Somebody removes a machine, whatever it does.
    pub fn delete(&self, key: &Key) {
        self.changes(|machines| machines.all.remove(key));
    }

    /// Somebody starts a machine, or starts it anew.
    pub fn start(&self, key: &Key) {
        self.changes(|machines| machines.run(key));
    }

    /// A machine powers off by itself, or somebody ends it by force.
    pub fn stop(&self, key: &Key, forced: bool) {
        self.machine(key, |machine| machine.run = Run::Off { forced });
    }

    /// Somebody has a machine's CPUs stand.
    pub fn pause(&self, key: &Key) {
        self.machine(key, |machine| machine.run = Run::Paused);
    }

    /// Somebody has a machine's CPUs go on.
    pub fn unpause(&self, key: &Key) {
        self.machine(key, |machine| machine.run = Run::Running);
    }

    /// A machine is on its way from one state to another.
    pub fn is_on_its_way(&self, key: &Key) {
        self.machine(key, |machine| machine.run = Run::Between);
    }

    /// How often a machine was reset or rebooted.
    pub fn resets(&self, key: &Key) -> u32 {
        lock(&self.0.machines).all.get(key).map_or(0, |machine| machine.resets)
    }

    /// From now on requests are not answered.
    pub fn hang(&self) {
        self.0.line.send_replace(Line::Hangs);
    }

    /// From now on there is no connection.
    pub fn cut_off(&self) {
        self.0.line.send_replace(Line::Cut);
    }

    /// From now on requests are answered again.
    pub fn bring_back(&self) {
        self.0.line.send_replace(Line::Answers);
    }

    fn changes<T>(&self, change: impl FnOnce(&mut Machines) -> T) -> T {
        let changed = change(&mut lock(&self.0.machines));
        self.0.changes.send_modify(|count| *count += 1);
        changed
    }

    fn machine(&self, key: &Key, change: impl FnOnce(&mut Machine)) {
        self.changes(|machines| machines.all.get_mut(key).map(change));
    }

    /// Returns when a request is answered.
    async fn answers(&self) -> Result<(), DriverError> {
        let mut line = self.0.line.subscribe();
        let line = line.wait_for(|line| *line != Line::Hangs).await.map(|line| *line);
        match line {
            Ok(Line::Answers) => Ok(()),
            _ => Err(DriverError::Hypervisor("the connection is cut".to_owned())),
        }
    }
}

impl Machines {
    fn run(&mut self, key: &Key) {
        self.starts += 1;
        if let Some(machine) = self.all.get_mut(key) {
            (machine.run, machine.mark) = (Run::Running, Some(self.starts));
        }
    }

    fn does(&mut self, key: &Key, deed: Deed) -> Result<(), DriverError> {
        let machine = self.all.get_mut(key).ok_or(DriverError::Gone)?;
        let fits = match deed {
            Deed::Start => !machine.run.is_active(),
            Deed::Shutdown | Deed::Reboot | Deed::Suspend => machine.run == Run::Running,
            Deed::Resume => machine.run == Run::Paused,
            Deed::Reset | Deed::Destroy => machine.run.is_active(),
        };
        if !fits {
            return Err(DriverError::Refused("the host says that its state does not allow that".to_owned()));
        }
        match deed {
            Deed::Start => self.run(key),
            Deed::Shutdown => machine.run = Run::Off { forced: false },
            Deed::Reboot | Deed::Reset => machine.resets += 1,
            Deed::Suspend => machine.run = Run::Paused,
            Deed::Resume => machine.run = Run::Running,
            Deed::Destroy => machine.run = Run::Off { forced: true },
        }
        Ok(())
    }
}

impl Machine {
    fn new(uuid: Uuid, name: &str) -> Machine {
        // It can be read.
        let blank = DomainDef::parse(BLANK).unwrap_or_default();
        let def = DomainDef { uuid, name: name.to_owned(), ..blank };
        let run = Run::Off { forced: false };
        Machine { def: Arc::new(def), run, mark: None, resets: 0 }
    }

    fn picture(&self, key: &Key) -> Picture {
        let (uuid, name) = (self.def.uuid, self.def.name.clone());
        Picture { seen: Seen { key: key.clone(), uuid, name, def: self.def.clone() }, run: self.run, mark: self.mark }
    }
}

#[async_trait]
impl Remote for TestConnection {
    const DRIVER: &'static str = "test";
    const TYPES: &'static [&'static str] = &["test"];
    const PROOF: &'static str = "a host in memory: there is no product to run it against";

    fn address(&self) -> String {
        String::new()
    }

    fn abilities(&self) -> &[Ability] {
        &self.host.0.abilities
    }

    async fn connect(&self) -> Result<String, DriverError> {
        self.host.answers().await?;
        Ok(format!("virtd's host in memory {}", env!("CARGO_PKG_VERSION")))
    }

    async fn pictures(&self, which: Which<'_>) -> Result<Vec<Picture>, DriverError> {
        self.host.answers().await?;
        let machines = lock(&self.host.0.machines);
        let wanted = |key: &Key| match which {
            Which::All => true,
            Which::One(one) => one == key,
        };
        Ok(machines.all.iter().filter(|(key, _)| wanted(key)).map(|(key, machine)| machine.picture(key)).collect())
    }

    /// It tells when something changes, or the connection is cut; that it hangs is found out by asking.
    async fn changed(&self, poll: Duration) -> Result<(), DriverError> {
        let house = &self.host.0;
        let (mut changes, mut line) = (house.changes.subscribe(), house.line.subscribe());
        let changed = async {
            let count = changes.wait_for(|count| *count != *lock(&self.told)).await.map(|count| *count);
            count.iter().for_each(|count| *lock(&self.told) = *count);
        };
        let cut = async { line.wait_for(|line| *line == Line::Cut).await.map(|line| *line) };
        tokio::select! {
            () = changed => Ok(()),
            _ = cut => self.host.answers().await,
            () = tokio::time::sleep(poll) => Ok(()),
        }
    }

    async fn ask(&self, key: &Key, deed: Deed) -> Result<(), DriverError> {
        self.host.answers().await?;
        self.host.changes(|machines| machines.does(key, deed))
    }

    async fn rename(&self, key: &Key, name: &str) -> Result<(), DriverError> {
        self.host.answers().await?;
        self.host.changes(|machines| {
            let machine = machines.all.get_mut(key).ok_or(DriverError::Gone)?;
            if machine.run.is_active() {
                return Err(DriverError::Refused("the host says that a machine that runs keeps its name".to_owned()));
            }
            name.clone_into(&mut Arc::make_mut(&mut machine.def).name);
            Ok(())
        })
    }
}
