//! What is known of a running guest, on disk while it runs: what finds it again, and how it is started.

use super::{Store, managed, replace_json};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::time::now_usec;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use uuid::Uuid;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::{Adjustment, Recorder};
use virt_model::state::{DomainState, StateReason};
use virt_model::xml::{Limits, unreadable};

/// What is known of a running guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub driver: String,
    pub id: u32,
    pub owner: u32,
    pub state: DomainState,
    pub reason: StateReason,
    pub since_usec: u64,
    /// The bus name whose departure ends the guest; empty for a caller without one, who is gone by now.
    pub autodestroy: Option<String>,
    /// The live configuration, with passwords.
    pub live: String,
    /// What the guest was asked to let go of, by its name, and the element that then goes from what is stored, too.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub leaving: BTreeMap<String, Option<String>>,
    /// What is being changed on it without being plugged: until `live` says so, or it is as before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adjusting: Option<Adjusting>,
    /// The driver's own; absent until the driver has something to lose.
    pub record: Option<serde_json::Value>,
}

/// What is being changed on a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Adjusting {
    /// The live configuration as it is to be, with passwords.
    pub after: String,
    /// In what the guest is to follow.
    pub what: Vec<Adjustment>,
    /// What is to be stored beside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<StoredChange>,
    /// The device that it is being given: once it has that, all that may be missing is what is to be stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The guest has followed, and `live` says so: all that may be missing is what is to be stored.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub followed: bool,
}

/// A stored configuration and what comes in its place, as texts with passwords.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StoredChange {
    pub before: String,
    pub after: String,
}

impl Store {
    /// A status file, not yet written.
    pub fn status_file(&self, uuid: Uuid, status: Status) -> Arc<StatusFile> {
        self.status_file_as(uuid, Kept { status, start: None, behind: false })
    }

    /// The status of a guest that is being started; [`StatusFile::started`] ends that.
    pub fn status_file_of_start(&self, uuid: Uuid, status: Status) -> Arc<StatusFile> {
        self.status_file_as(uuid, Kept { status, start: Some(None), behind: false })
    }

    fn status_file_as(&self, uuid: Uuid, kept: Kept) -> Arc<StatusFile> {
        let (path, saved) = (self.status(uuid), self.managed_save(uuid));
        Arc::new(StatusFile { path, saved, kept: Mutex::new(Some(kept)), marked: watch::Sender::default() })
    }
}

/// The status of one guest, on disk and in memory.
#[derive(Debug)]
pub(crate) struct StatusFile {
    path: PathBuf,
    /// Its managed save, if there is one.
    saved: PathBuf,
    /// `None` once the guest has gone.
    kept: Mutex<Option<Kept>>,
    /// Its guest goes on from its managed save, which is kept.
    marked: watch::Sender<bool>,
}

#[derive(Clone, Debug)]
struct Kept {
    status: Status,
    /// While it is being started: the configuration that is written with the driver's next record, which can be read again.
    start: Option<Option<String>>,
    /// The file says of it that something is being changed, which is done.
    behind: bool,
}

impl StatusFile {
    /// Of a guest of which nothing is written, as another host keeps its machine.
    pub fn of_nobody() -> Arc<StatusFile> {
        let (path, saved) = (PathBuf::new(), PathBuf::new());
        Arc::new(StatusFile { path, saved, kept: Mutex::default(), marked: watch::Sender::default() })
    }

    /// Changes it and writes it. On failure it is as before. Nothing is written of a guest that has gone, nor a
    /// configuration that could not be read again: then the one before it, which could, is what finds the guest.
    pub fn update(&self, change: impl FnOnce(&mut Status)) -> Result<()> {
        self.write(|kept| {
            let before = kept.status.live.clone();
            change(&mut kept.status);
            if kept.status.live == before { Ok(()) } else { can_be_read_again(&kept.status.live) }
        })
    }

    /// The guest runs as `live` from now on. What is kept already is not written again.
    pub fn runs_as(&self, live: String) -> Result<()> {
        if lock(&self.kept).as_ref().is_some_and(|kept| kept.status.live == live) {
            return Ok(());
        }
        self.update(|status| {
            status.live = live;
            status.adjusting.iter_mut().for_each(|adjusting| adjusting.followed = false);
        })
    }

    /// The same after the guest has followed in what is being changed on it.
    pub fn runs_as_adjusted(&self, live: String) -> Result<()> {
        self.update(|status| {
            status.live = live;
            status.adjusting.iter_mut().for_each(|adjusting| adjusting.followed = true);
        })
    }

    /// The guest is about to be given a device, with which it runs as `live`; `noted`: what follows then.
    pub fn is_given(&self, live: String, noted: Option<Adjusting>) -> Result<()> {
        self.update(|status| (status.live, status.adjusting) = (live, noted))
    }

    /// What is being changed on the guest.
    pub fn adjusting(&self) -> Option<Adjusting> {
        lock(&self.kept).as_ref().and_then(|kept| kept.status.adjusting.clone())
    }

    /// The guest is up, and runs as `live`: gives since when, in µs since 1970. Writes that only where it is not
    /// [kept](StatusFile::started_as_said) yet; on failure the file is as before, and the time is now.
    pub fn started(&self, live: String) -> (u64, Result<()>) {
        if let Some(since_usec) = self.started_as_said(&live) {
            return (since_usec, Ok(()));
        }
        // What a driver records from now on has nothing to do with the start.
        lock(&self.kept).iter_mut().for_each(|kept| kept.start = None);
        let since_usec = now_usec();
        (since_usec, self.update(|status| (status.live, status.since_usec) = (live, since_usec)))
    }

    /// The same where the driver's last record was written with that configuration: gives nothing where it was not, or is just
    /// being written. Waits for nothing.
    pub fn started_as_said(&self, live: &str) -> Option<u64> {
        let mut kept = self.kept.try_lock().ok()?;
        let kept = kept.as_mut()?;
        let is_kept = kept.start.as_ref()?.is_some() && kept.status.record.is_some() && kept.status.live == live;
        is_kept.then(|| {
            kept.start = None;
            kept.status.since_usec
        })
    }

    fn write(&self, change: impl FnOnce(&mut Kept) -> Result<()>) -> Result<()> {
        let mut kept = lock(&self.kept);
        let Some(mut changed) = kept.clone() else { return Ok(()) };
        change(&mut changed)?;
        replace_json(&self.path, &changed.status)?;
        changed.behind = false;
        *kept = Some(changed);
        Ok(())
    }

    /// What was being changed on the guest is done, also in what is stored. The file says so with what is written next: whoever
    /// finds it before finds nothing left to do, as long as nothing else is stored ([`StatusFile::catch_up`]).
    pub fn is_adjusted(&self) {
        if let Some(kept) = lock(&self.kept).as_mut() {
            kept.behind |= kept.status.adjusting.take().is_some();
        }
    }

    /// Has the file say what is done.
    pub fn catch_up(&self) -> Result<()> {
        let behind = lock(&self.kept).as_ref().is_some_and(|kept| kept.behind);
        if behind { self.write(|_| Ok(())) } else { Ok(()) }
    }

    /// The same before this is stored: what was to be stored beside an earlier change is not any more.
    pub fn will_store(&self, text: &str) -> Result<()> {
        let is_other = |adjusting: &Adjusting| adjusting.stored.as_ref().is_some_and(|noted| noted.after != text);
        let (behind, other) = {
            let kept = lock(&self.kept);
            let Some(kept) = kept.as_ref() else { return Ok(()) };
            (kept.behind, kept.status.adjusting.as_ref().is_some_and(is_other))
        };
        if !behind && !other {
            return Ok(());
        }
        self.write(|kept| {
            kept.status.adjusting.iter_mut().filter(|adjusting| is_other(adjusting)).for_each(|one| one.stored = None);
            Ok(())
        })
    }

    /// The guest has gone: nothing is written from now on, nor is its managed save marked as used. Blocks while something is being
    /// written.
    pub fn close(&self) {
        lock(&self.kept).take();
    }

    /// Whether it has been kept that its guest goes on from its managed save; and, in time, that it has been.
    pub fn marked(&self) -> watch::Receiver<bool> {
        self.marked.subscribe()
    }
}

fn can_be_read_again(live: &str) -> Result<()> {
    let read = DomainDef::parse_within(live, Limits::STORED);
    let refused =
        |findings: Vec<_>| Error::OperationUnsupported(format!("what runs cannot be kept: {}", unreadable(&findings)));
    read.map(drop).map_err(refused)
}

impl Recorder for StatusFile {
    fn goes_on(&self) -> io::Result<()> {
        {
            // Whoever has closed it knows from then on what has become of the managed save.
            let kept = lock(&self.kept);
            if kept.is_none() {
                return Err(io::Error::other("its start has been given up"));
            }
            managed::is_used(&self.saved).map_err(|e| io::Error::other(e.to_string()))?;
        }
        self.marked.send_replace(true);
        managed::step_of_start(&self.saved);
        Ok(())
    }

    fn record(&self, record: serde_json::Value) -> io::Result<()> {
        let written = self.write(|kept| {
            kept.status.record = Some(record);
            if let Some(said) = &kept.start {
                kept.status.live = said.clone().unwrap_or_else(|| kept.status.live.clone());
                kept.status.since_usec = now_usec();
            }
            Ok(())
        });
        managed::step_of_start(&self.saved);
        written.map_err(|e| io::Error::other(e.to_string()))
    }

    fn will_run(&self, live: &DomainDef) {
        let Some(id) = lock(&self.kept).as_ref().map(|kept| kept.status.id) else { return };
        let text = DomainDef { id: Some(id), ..live.clone() }.write(Form::LIVE);
        // What cannot be kept is told when the start has returned.
        if can_be_read_again(&text).is_ok()
            && let Some(kept) = lock(&self.kept).as_mut()
        {
            kept.start = kept.start.take().map(|_| Some(text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    /// What a guest runs as is on disk with the driver's record, and nothing more is written once it is up.
    #[test]
    fn what_a_guest_will_run_as_is_written_with_the_record() {
        let (folder, file, mut live) = start();
        live.title = Some("as it runs".into());
        file.will_run(&live);
        file.record(1.into()).expect("written");
        let written = inode(&file);
        live.id = Some(7);
        let (since_usec, kept) = file.started(live.write(Form::LIVE));
        kept.expect("kept");
        assert_eq!(inode(&file), written, "nothing is written twice");
        let on_disk = status(&file);
        assert_eq!((on_disk.live, on_disk.since_usec), (live.write(Form::LIVE), since_usec));
        assert!(since_usec > 1, "since it is up, and not since it was wanted");
        // From now on the driver's record changes that alone.
        file.update(|status| (status.live, status.since_usec) = (live_named("later"), 2)).expect("written");
        file.record(2.into()).expect("written");
        let on_disk = status(&file);
        assert_eq!((on_disk.live, on_disk.since_usec, on_disk.record), (live_named("later"), 2, Some(2.into())));
        drop(folder);
    }

    #[test]
    fn what_a_guest_runs_as_is_written_when_it_is_up_if_it_was_not_said_before() {
        for said in [None, Some("other"), Some("toy")] {
            let (folder, file, live) = start();
            file.record(1.into()).expect("written");
            // After the last record: it is not on disk.
            said.iter().for_each(|name| file.will_run(&DomainDef { name: (*name).into(), ..live.clone() }));
            let (since_usec, kept) = file.started(live_named("toy"));
            kept.expect("kept");
            let on_disk = status(&file);
            assert_eq!((on_disk.live, on_disk.since_usec), (live_named("toy"), since_usec), "{said:?}");
            drop(folder);
        }
    }

    /// A start that is given up may still be about to mark its managed save: what is found then stays so.
    #[test]
    fn nothing_is_marked_for_a_start_that_has_been_given_up() {
        let (folder, file, _) = start();
        fs::write(&file.saved, b"saved").expect("written");
        file.close();
        assert!(file.goes_on().is_err());
        assert!(file.saved.exists() && !*file.marked().borrow());
        drop(folder);
        let (folder, file, _) = start();
        fs::write(&file.saved, b"saved").expect("written");
        file.goes_on().expect("it is wanted");
        assert!(!file.saved.exists() && *file.marked().borrow());
        drop(folder);
    }

    #[test]
    fn what_could_not_be_read_again_is_not_written() {
        let (folder, file, live) = start();
        let mut wrong = live.clone();
        wrong.name = "a/b\0".into();
        file.will_run(&wrong);
        file.record(1.into()).expect("written");
        assert_eq!(status(&file).live, live.write(Form::LIVE));
        let (_, kept) = file.started(wrong.write(Form::LIVE));
        assert!(kept.is_err());
        assert_eq!(status(&file).live, live.write(Form::LIVE));
        drop(folder);
    }

    #[test]
    fn what_is_done_is_written_with_what_comes_next_or_before_anything_is_stored() {
        let (folder, file, _) = start();
        let note = Adjusting { after: String::new(), what: Vec::new(), stored: None, device: None, followed: true };
        let is_noted = |file: &StatusFile| (file.adjusting().is_some(), status(file).adjusting.is_some());
        for write in [StatusFile::catch_up, |file: &StatusFile| file.update(|status| status.id = 8)] {
            file.update(|status| status.adjusting = Some(note.clone())).expect("written");
            assert_eq!(is_noted(&file), (true, true));
            file.catch_up().expect("nothing to write");
            assert_eq!(is_noted(&file), (true, true));
            file.is_adjusted();
            assert_eq!(is_noted(&file), (false, true));
            write(&file).expect("written");
            assert_eq!(is_noted(&file), (false, false));
        }
        drop(folder);
    }

    const XML: &str = "<domain type='test'><name>toy</name><uuid>00000000-0000-0000-0000-000000000001</uuid>\
                       <memory>65536</memory><os><type>hvm</type></os></domain>";

    /// The status of a guest that is about to be started, since 1 µs.
    fn start() -> (tempfile::TempDir, Arc<StatusFile>, DomainDef) {
        let folder = tempfile::tempdir().expect("a folder");
        let live = DomainDef::parse_within(XML, Limits::STORED).expect("a definition");
        let status = Status {
            driver: "test".into(),
            id: 7,
            owner: 0,
            state: DomainState::Running,
            reason: StateReason::Booted,
            since_usec: 1,
            autodestroy: None,
            live: live.write(Form::LIVE),
            leaving: BTreeMap::new(),
            adjusting: None,
            record: None,
        };
        let kept = Mutex::new(Some(Kept { status, start: Some(None), behind: false }));
        let file = Arc::new(StatusFile {
            path: folder.path().join("status.json"),
            saved: folder.path().join("0.virtsave"),
            kept,
            marked: watch::Sender::default(),
        });
        (folder, file, live)
    }

    fn live_named(name: &str) -> String {
        let live = DomainDef::parse_within(XML, Limits::STORED).expect("a definition");
        DomainDef { id: Some(7), name: name.into(), ..live }.write(Form::LIVE)
    }

    fn status(file: &StatusFile) -> Status {
        serde_json::from_slice(&fs::read(&file.path).expect("it is there")).expect("a status")
    }

    fn inode(file: &StatusFile) -> u64 {
        fs::metadata(&file.path).expect("it is there").ino()
    }
}
