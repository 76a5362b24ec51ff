//! What lies in a drive, changed while the guest runs.

use super::block::{Nodes, below};
use super::command::{self, Medium};
use super::given::{self, GivenImage};
use super::instance::Body;
use super::plan::HostFile;
use super::{QemuDriver, check, declared};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use virt_model::device::Disk;
use virt_model::domain::DomainDef;
use virt_model::driver::{DriverError, GivenFile, MediumExchange};
use virt_model::xml::refusals;

/// How long a guest may take to let go of its tray.
const TRAY: Duration = Duration::from_secs(10);

impl QemuDriver {
    /// Changes what lies in a drive to what `def` says, or to the image that has been given. On failure it holds what it held.
    /// Errors: `Refused` or `TrayLocked` if the guest keeps the tray locked; `Unsupported` if the medium takes a secret.
    pub(super) async fn change_medium(
        &self,
        body: &Body,
        def: &DomainDef,
        target: &str,
        how: MediumExchange,
        image: Option<&GivenFile>,
    ) -> Result<(), DriverError> {
        let disk = drive_of(def, target)?;
        let caps = self.learnt_for(def).await;
        refusals(check::check(&given::as_shown(def), &caps)).map_err(DriverError::Config)?;
        declared::hold(&self.0.workers, def).await?;
        let has = GivenImage::of(disk);
        if let Some(image) = image {
            given::hand_over(body, disk, image).await?;
        }
        let lend = async |files: Vec<HostFile>| self.lend_to(body, def, files).await.map(drop);
        let changed = change(body, disk, how, |name| command::medium(def, &caps, disk, name), lend).await;
        match &changed {
            Ok(()) => given::take_back(body, target, has).await,
            Err(_) => given::take_back_this(body, has).await,
        }
        changed
    }

    /// Puts what `def` says into a drive in which what `after` says may lie. A guest that has it is not asked. On failure `def` says
    /// what lies in it then. What was given by descriptor cannot be opened again: the drive is left empty, which is an error.
    pub(super) async fn put_back_medium(
        &self,
        body: &Body,
        after: &DomainDef,
        def: &mut DomainDef,
        target: &str,
    ) -> Result<(), DriverError> {
        if has_medium(body, drive_of(def, target)?).await? {
            return keep_medium(body, drive_of(def, target)?).await;
        }
        let drives = def.devices.disks.iter_mut();
        let lost = drives.filter(|disk| disk.target.dev == target && disk.is_given()).map(|disk| disk.source = None);
        let lost = lost.count() > 0;
        if let Err(error) = self.change_medium(body, def, target, MediumExchange::default(), None).await {
            let new = drive_of(after, target)?;
            if !has_medium(body, new).await? {
                return Err(error);
            }
            let drives = def.devices.disks.iter_mut();
            drives.filter(|disk| disk.target.dev == target).for_each(|disk| disk.clone_from(new));
            // Whatever did not answer: how it is now is known.
            return Err(DriverError::Refused(error.to_string()));
        }
        match lost {
            true => Err(DriverError::Refused("what lay in it was given by descriptor: it is empty now".to_owned())),
            false => Ok(()),
        }
    }
}

fn drive_of<'a>(def: &'a DomainDef, target: &str) -> Result<&'a Disk, DriverError> {
    let disk = def.devices.disks.iter().find(|disk| disk.target.dev == target);
    disk.ok_or_else(|| DriverError::Internal("a disk is lost".to_owned()))
}

/// Whether what the definition says lies in the drive. Of what is on a server that is not known: then it does not.
async fn has_medium(body: &Body, disk: &Disk) -> Result<bool, DriverError> {
    let Some(mut top) = Drive::of(body, disk, MediumExchange::default()).medium().await? else {
        return Ok(disk.is_empty());
    };
    let file = match GivenImage::of(disk) {
        Some(image) => image.file_name(),
        None => disk.path().unwrap_or_default().to_owned(),
    };
    let nodes = Nodes::of(body).await?;
    loop {
        let Some(node) = nodes.0.iter().find(|node| node.name == top) else { return Ok(false) };
        if node.driver != "throttle" {
            return Ok(!file.is_empty() && node.driver == disk.meant_format() && node.file == Path::new(&file));
        }
        top = below(body, &top).await?;
    }
}

/// What was begun to put another medium into the drive goes.
async fn keep_medium(body: &Body, disk: &Disk) -> Result<(), DriverError> {
    let drive = Drive::of(body, disk, MediumExchange::default());
    let _ours = body.reporter.moves_tray(drive.id);
    drive.close_tray().await?;
    drive.close_all_of(disk, Nodes::of(body).await?).await;
    given::take_back(body, &disk.target.dev, GivenImage::of(disk)).await;
    Ok(())
}

/// Exchanges the medium: the new one is opened before the old one leaves the drive. On failure the old one is in it.
/// `medium` says what is to be opened under names that begin so; `lend` makes files accessible to QEMU.
pub(super) async fn change(
    body: &Body,
    disk: &Disk,
    how: MediumExchange,
    medium: impl FnOnce(&str) -> Option<Medium>,
    lend: impl AsyncFnOnce(Vec<HostFile>) -> Result<(), DriverError>,
) -> Result<(), DriverError> {
    let drive = Drive::of(body, disk, how);
    let _ours = body.reporter.moves_tray(drive.id);
    let nodes = Nodes::of(body).await?;
    let before = drive.medium().await?;
    let mut added = Vec::new();
    let top = match medium(&nodes.free_name(&disk.target.dev)) {
        None => None,
        Some(medium) if medium.secret => {
            return Err(DriverError::Unsupported(
                "a medium that takes a secret can be put in only while the guest is off".to_owned(),
            ));
        }
        Some(medium) => {
            lend(medium.files).await?;
            if let Err(error) = drive.open(medium.objects, medium.nodes, &mut added).await {
                drive.close(added).await;
                return Err(error);
            }
            Some(medium.top)
        }
    };
    if let Err(error) = drive.exchange(before.as_deref(), top.as_deref()).await {
        drive.close(added).await;
        return Err(error);
    }
    drive.close_all_of(disk, nodes).await;
    Ok(())
}

/// A drive of a running guest.
struct Drive<'a> {
    body: &'a Body,
    /// The device's.
    id: &'a str,
    how: MediumExchange,
}

impl<'a> Drive<'a> {
    fn of(body: &'a Body, disk: &'a Disk, how: MediumExchange) -> Drive<'a> {
        Drive { body, id: disk.info.alias().unwrap_or_default(), how }
    }

    async fn tell(&self, verb: &str, arguments: Value) -> Result<Value, DriverError> {
        self.body.ask(verb, arguments).await
    }

    /// The node of what lies in it.
    async fn medium(&self) -> Result<Option<String>, DriverError> {
        let told = self.tell("query-block", json!({})).await?;
        let drive = told.as_array().into_iter().flatten().find(|one| one["qdev"] == self.id);
        let drive = drive.ok_or_else(|| DriverError::Refused(format!("the guest has no drive '{}'", self.id)))?;
        Ok(drive["inserted"]["node-name"].as_str().map(str::to_owned))
    }

    /// Opens nodes; the names of those that are open are in `added`, on failure too.
    async fn open(&self, objects: Vec<Value>, nodes: Vec<Value>, added: &mut Vec<String>) -> Result<(), DriverError> {
        let told = self.tell("qom-list", json!({ "path": "/objects" })).await?;
        let there =
            |object: &Value| told.as_array().is_some_and(|all| all.iter().any(|one| one["name"] == object["id"]));
        for object in objects.into_iter().filter(|object| !there(object)) {
            self.tell("object-add", object).await?;
        }
        for node in nodes {
            let name = node["node-name"].as_str().unwrap_or_default().to_owned();
            // It opens what may lie on slow storage.
            self.body.patiently("blockdev-add", node).await?;
            added.push(name);
        }
        Ok(())
    }

    /// Takes one medium out and puts another in; where that fails, the first one in again.
    async fn exchange(&self, before: Option<&str>, after: Option<&str>) -> Result<(), DriverError> {
        self.open_tray().await?;
        let exchanged = async {
            self.with_open_tray("blockdev-remove-medium", json!({ "id": self.id })).await?;
            self.insert(after).await
        };
        let exchanged = exchanged.await;
        if exchanged.is_err() && self.medium().await?.is_none() {
            self.insert(before).await?;
        }
        self.close_tray().await?;
        exchanged
    }

    async fn close_tray(&self) -> Result<(), DriverError> {
        self.tell("blockdev-close-tray", json!({ "id": self.id })).await.map(drop)
    }

    async fn insert(&self, node: Option<&str>) -> Result<(), DriverError> {
        if let Some(node) = node {
            self.with_open_tray("blockdev-insert-medium", json!({ "id": self.id, "node-name": node })).await?;
        }
        Ok(())
    }

    /// Does what needs an open tray. A guest that uses the drive may close it at any time; then it is opened again.
    async fn with_open_tray(&self, verb: &str, arguments: Value) -> Result<(), DriverError> {
        let done = tokio::time::timeout(TRAY, async {
            loop {
                match self.tell(verb, arguments.clone()).await {
                    Err(DriverError::Hypervisor(why)) if is_closed(&why) => self.open_tray().await?,
                    done => return done.map(drop),
                }
            }
        });
        done.await.unwrap_or_else(|_| {
            Err(DriverError::Refused(
                "the guest closes the drive's tray again and again; let it eject the medium".into(),
            ))
        })
    }

    /// A guest may have locked the tray; it is told that somebody wants it open, and then has a while.
    async fn open_tray(&self) -> Result<(), DriverError> {
        let opened = tokio::time::timeout(self.how.patience.unwrap_or(TRAY), async {
            loop {
                let before = self.body.reporter.heard().trays;
                match self.tell("blockdev-open-tray", json!({ "id": self.id, "force": self.how.force })).await {
                    Err(DriverError::Hypervisor(why)) if why.contains("locked") => {}
                    done => return done.map(drop),
                }
                self.body.reporter.until(|heard| heard.closed || heard.trays > before).await;
            }
        });
        opened.await.unwrap_or_else(|_| {
            let why = "the guest keeps the drive's tray locked; let it eject the medium, or use 'force'".to_owned();
            Err(if self.how.patience.is_some() { DriverError::TrayLocked(why) } else { DriverError::Refused(why) })
        })
    }

    async fn close(&self, nodes: Vec<String>) {
        close(self.body, nodes).await;
    }

    /// Closes those of these nodes that were opened for that disk and that nothing uses.
    async fn close_all_of(&self, disk: &Disk, nodes: Nodes) {
        let prefix = format!("{}-", disk.target.dev);
        let names = nodes.0.into_iter().map(|node| node.name);
        self.close(names.filter(|name| name.starts_with(&prefix)).collect()).await;
    }
}

/// Closes nodes that nothing uses; what is in use stays. A node can be closed once none stands on it.
pub async fn close(body: &Body, mut nodes: Vec<String>) {
    loop {
        let count = nodes.len();
        let mut left = Vec::new();
        for node in nodes {
            if body.ask("blockdev-del", json!({ "node-name": node })).await.is_err() {
                left.push(node);
            }
        }
        if left.is_empty() || left.len() == count {
            return;
        }
        nodes = left;
    }
}

/// Whether QEMU says that it wants the tray open.
fn is_closed(why: &str) -> bool {
    why.contains("Tray of device") && why.contains("is not open")
}
