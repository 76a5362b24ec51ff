//! Disk images without a guest: `qemu-img`, run with the rights of QEMU's user, so that what a guest has written into an
//! image cannot do more than the guest could. Every file that it opens is named here, with its format: nothing is guessed from
//! what an image holds, and nothing that its header names is opened. All functions block, and end soon after [`Images::stop`]
//! tells them to.

use super::access::{LentFile, Want};
use super::apart;
use super::behind::{self, Behind};
use super::lender::Lender;
use super::resolve::Found;
use super::secret::handed;
use super::threads;
use super::tool::{Bounds, finish, tame};
use super::user::RunAs;
use super::wall::{self, Wall};
use super::workers::Stop;
use rustix::fs::FileType;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::driver::checkpoints::BitmapState;

/// Seconds of a CPU's time for an image of some megabytes.
const CONVERSION: u64 = 60;
/// What the tool may take of the host. A chain that is a loop ends with the files that it may open.
pub(super) const BOUNDS: Bounds = Bounds { data: Some(2 << 30), cpu: None, files: Some(1024) };
const NOT_INSTALLED: &str = "qemu-img is not installed (Debian has it in qemu-utils)";
/// The deed that changes nothing.
const LOOK: &str = "look at";

/// What is lent now, by the number it is lent under.
type Shelf = Arc<Mutex<Vec<(Uuid, Vec<LentFile>)>>>;

/// Works on the images of one domain.
#[derive(Clone)]
pub struct Images {
    /// By whose rights.
    pub lender: Lender,
    /// Whose images. They are lent under numbers of their own: what the running guest was lent stays lent.
    pub guest: Uuid,
    /// The guest's QEMU, while it runs.
    pub process: Option<i32>,
    lent: Shelf,
    /// How they are told to stop.
    pub stop: Arc<Stop>,
}

/// What an image says of itself.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// What a guest sees, in bytes.
    pub virtual_size: u64,
    /// What it takes on disk, in bytes.
    #[serde(default)]
    pub actual_size: u64,
    /// Snapshots in it.
    #[serde(default)]
    pub snapshots: Vec<InnerSnapshot>,
    /// What only its format has.
    #[serde(default)]
    pub format_specific: FormatSpecific,
    /// What its header says that it stands on.
    #[serde(default)]
    pub full_backing_filename: Option<PathBuf>,
}

/// What only images of one format have.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct FormatSpecific {
    #[serde(default)]
    data: Qcow2Data,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Qcow2Data {
    #[serde(default)]
    bitmaps: Vec<Bitmap>,
}

#[derive(Clone, Debug, Deserialize)]
struct Bitmap {
    name: String,
    #[serde(default)]
    flags: Vec<String>,
}

impl ImageInfo {
    /// The bitmaps in it, which tell backups what has been written.
    pub fn bitmaps(&self) -> Bitmaps {
        let state = |bitmap: &Bitmap| {
            let is = |flag: &str| bitmap.flags.iter().any(|one| one == flag);
            match (is("in-use"), is("auto")) {
                (true, _) => BitmapState::Inconsistent,
                (false, false) => BitmapState::Idle,
                (false, true) => BitmapState::Sound,
            }
        };
        self.format_specific.data.bitmaps.iter().map(|bitmap| (bitmap.name.clone(), state(bitmap))).collect()
    }
}

/// The bitmaps of an image by their names.
pub type Bitmaps = BTreeMap<String, BitmapState>;

/// Refuses to bring an image with bitmaps to a snapshot inside it: neither QEMU nor its tools do that, for what the bitmaps say
/// would not be true any more.
pub fn without_bitmaps(path: &Path, bitmaps: &Bitmaps) -> Result<(), DriverError> {
    let Some(bitmap) = bitmaps.keys().next() else { return Ok(()) };
    let path = path.display();
    Err(DriverError::Refused(format!(
        "{path} holds the dirty bitmap '{bitmap}', and an image that holds one cannot be brought to a snapshot inside it; delete \
         the checkpoint that it is of, or shut the guest down and remove it with 'qemu-img bitmap --remove {path} {bitmap}'"
    )))
}

/// A snapshot inside an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InnerSnapshot {
    /// Its number in the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of memory in it.
    #[serde(default)]
    pub vm_state_size: u64,
}

/// Files lent for a while, whatever else is lent meanwhile.
pub struct Lent {
    lender: Lender,
    holder: Uuid,
    shelf: Shelf,
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner).retain(|(number, _)| *number != self.holder);
        self.lender.leave(self.holder);
    }
}

/// Files that are lent where nobody may wait for their file system: they are given back on a thread of its own.
pub struct LentFromAfar(Option<Lent>);

impl From<Lent> for LentFromAfar {
    fn from(lent: Lent) -> LentFromAfar {
        LentFromAfar(Some(lent))
    }
}

impl Drop for LentFromAfar {
    fn drop(&mut self) {
        let lent = self.0.take();
        // Without a thread it is done here: better late than never.
        let _ = threads::run(move || drop(lent));
    }
}

impl Images {
    /// Those of that guest.
    pub fn new(lender: Lender, guest: Uuid, process: Option<i32>) -> Images {
        Images { lender, guest, process, lent: Arc::default(), stop: Arc::default() }
    }

    /// The same within an errand that may be stopped.
    pub fn within(&self, stop: &Arc<Stop>) -> Images {
        Images { stop: stop.clone(), ..self.clone() }
    }

    /// Lends images to QEMU's user until what is returned is dropped.
    pub fn lend(&self, images: &[(PathBuf, bool)]) -> Result<Lent, DriverError> {
        let holder = self.lender.join(self.guest);
        let lent = Lent { lender: self.lender.clone(), holder, shelf: self.lent.clone() };
        let files = self.lender.lend(holder, &wants(images))?;
        self.lent.lock().unwrap_or_else(PoisonError::into_inner).push((holder, files));
        Ok(lent)
    }

    /// The same, and the running guest finds them so, too.
    pub fn lend_with_guest(&self, images: &[(PathBuf, bool)]) -> Result<Lent, DriverError> {
        let lent = self.lend(images)?;
        let all = self.lent.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let files = all.into_iter().filter(|(holder, _)| *holder == lent.holder).flat_map(|(_, files)| files);
        let named = files.filter(|file| images.iter().any(|(path, _)| *path == file.path));
        self.show(&named.collect::<Vec<_>>())?;
        Ok(lent)
    }

    /// Lends images to the running guest, for as long as it runs.
    pub fn lend_to_guest(&self, images: &[(PathBuf, bool)]) -> Result<(), DriverError> {
        self.show(&self.lender.lend_more(self.guest, &wants(images))?)
    }

    fn show(&self, files: &[LentFile]) -> Result<(), DriverError> {
        let shown = self.process.map_or(Ok(()), |process| wall::show(process, files));
        shown.map_err(|e| DriverError::Storage(format!("the guest cannot be shown a file: {e}")))
    }

    /// What an image says of itself, also while a guest has it open.
    pub fn info(&self, path: &Path, format: &str) -> Result<ImageInfo, DriverError> {
        let named = named(&[(path.to_owned(), format.to_owned())]);
        let told = self.run(LOOK, path, ["info", "--output=json", "-U"], [named])?;
        serde_json::from_slice(&told).map_err(|e| DriverError::Storage(format!("{}: {e}", path.display())))
    }

    /// Makes a snapshot inside an image.
    pub fn take(&self, path: &Path, name: &str) -> Result<(), DriverError> {
        self.snapshot("take a snapshot in", "-c", path, name)
    }

    /// Brings an image to a snapshot inside it, or refuses that before anything is changed. By its number: where a name is asked for, another's number that reads the
    /// same comes first.
    pub fn apply(&self, path: &Path, name: &str) -> Result<(), DriverError> {
        let info = self.info(path, "qcow2")?;
        without_bitmaps(path, &info.bitmaps())?;
        let inner = info.snapshots.into_iter().find(|inner| inner.name == name);
        let inner = inner.ok_or_else(|| {
            DriverError::Storage(format!("{} does not hold the snapshot '{name}' any more", path.display()))
        })?;
        self.snapshot("revert", "-a", path, &inner.id)
    }

    /// Removes a snapshot from an image; one that is not there is fine.
    pub fn forget(&self, path: &Path, name: &str) -> Result<(), DriverError> {
        if !self.info(path, "qcow2")?.snapshots.iter().any(|inner| inner.name == name) {
            return Ok(());
        }
        self.snapshot("delete a snapshot in", "-d", path, name)
    }

    /// From now on a bitmap in the image tells what is written to it.
    pub fn add_bitmap(&self, path: &Path, name: &str) -> Result<(), DriverError> {
        self.bitmap("keep a bitmap in", "--add", path, name)
    }

    /// Removes a bitmap from an image; one that is not there is fine.
    pub fn remove_bitmap(&self, path: &Path, name: &str) -> Result<(), DriverError> {
        match self.info(path, "qcow2")?.bitmaps().contains_key(name) {
            true => self.bitmap("remove a bitmap from", "--remove", path, name),
            false => Ok(()),
        }
    }

    fn bitmap(&self, deed: &str, option: &str, path: &Path, name: &str) -> Result<(), DriverError> {
        // What the image stands on has no part in it. A name may begin with a dash.
        let named = named(&[(path.to_owned(), "qcow2".to_owned())]);
        self.run(deed, path, ["bitmap", option, "--"], [named, name.into()]).map(drop)
    }

    fn snapshot(&self, deed: &str, option: &str, path: &Path, name: &str) -> Result<(), DriverError> {
        // What the image stands on has no part in it.
        let named = named(&[(path.to_owned(), "qcow2".to_owned())]);
        self.run(deed, path, ["snapshot", "-q", option], [name.into(), named]).map(drop)
    }

    /// Makes an overlay of `size` bytes in a file that is there and empty, or in a block device.
    pub fn overlay(
        &self,
        path: &Path,
        format: &str,
        base: &Path,
        base_format: &str,
        size: u64,
    ) -> Result<(), DriverError> {
        let fixed = ["create", "-q", "-u", "-f", format, "-F", base_format, "-b"];
        self.run("make", path, fixed, [base.into(), path.into(), size.to_string().into()]).map(drop)
    }

    /// Writes what is in an overlay into what it stands on. `chain`: each file with its format, from the overlay down to the
    /// last; the second is written.
    pub fn commit(&self, chain: &[(PathBuf, String)]) -> Result<(), DriverError> {
        let overlay = chain.first().map_or(Path::new("/"), |(path, _)| path);
        self.run("merge", overlay, ["commit", "-q", "-d"], [named(chain)]).map(drop)
    }

    /// Says in an overlay what it stands on.
    pub fn rebase(&self, overlay: &Path, format: &str, base: &Path, base_format: &str) -> Result<(), DriverError> {
        let fixed = ["rebase", "-q", "-u", "-f", format, "-F", base_format, "-b"];
        self.run("rebase", overlay, fixed, [base.into(), overlay.into()]).map(drop)
    }

    /// Says in an image that it stands on nothing.
    pub fn stand_alone(&self, image: &Path, format: &str) -> Result<(), DriverError> {
        let fixed = ["rebase", "-q", "-u", "-f", format, "-b", ""];
        self.run("rebase", image, fixed, [image.into()]).map(drop)
    }

    /// Makes an image of `size` bytes, which stands on nothing, in a file that is there and empty.
    pub fn create(&self, path: &Path, format: &str, size: u64) -> Result<(), DriverError> {
        let fixed = ["create", "-q", "-f", format];
        self.run("make", path, fixed, [path.into(), size.to_string().into()]).map(drop)
    }

    /// Gives the topmost image of a chain another size. `chain`: each file with its format.
    pub fn resize(&self, chain: &[(PathBuf, String)], size: u64, shrink: bool) -> Result<(), DriverError> {
        let image = chain.first().map_or(Path::new("/"), |(path, _)| path);
        let fixed: &[&str] = if shrink { &["resize", "-q", "--shrink"] } else { &["resize", "-q"] };
        self.run("resize", image, fixed, [named(chain), size.to_string().into()]).map(drop)
    }

    /// Makes an image in a file that is called `name`, is empty, and need have no name yet: the tool finds it as its output, and what
    /// opens it, if anything does, as its input. What else it is to read is lent.
    pub fn make(
        &self,
        name: &str,
        to: &File,
        arguments: Vec<OsString>,
        secret: Option<&[u8]>,
    ) -> Result<(), DriverError> {
        self.stop.check()?;
        let wall = self.wall();
        let done = apart::without(|| {
            let mut command = Command::new("qemu-img");
            let input = secret.map(handed).transpose()?;
            command.args(&arguments).env("LC_ALL", "C").stdin(input.map_or_else(Stdio::null, Stdio::from));
            command.stdout(apart::fetch(to)?).stderr(Stdio::piped());
            tame(&mut command, self.lender.user().map(Into::into), BOUNDS);
            if self.lender.user().is_some() {
                // From there nothing is fetched any more.
                wall.enter(None)?;
            }
            // What it has written by then is thrown away.
            finish(&mut command, &self.stop, false)
        });
        let done = done.map_err(|e| not_run("qemu-img", NOT_INSTALLED, e))?;
        if done.status.success() {
            return Ok(());
        }
        // Its output, and the whole of a chain, are no names for people.
        let words = String::from_utf8_lossy(&done.stderr).replace(TOOL_OUTPUT, name);
        let chains =
            arguments.iter().map(|argument| argument.to_string_lossy()).filter(|text| text.starts_with("json:"));
        let words = chains.fold(words, |words, chain| words.replace(&*chain, "what it is made of"));
        Err(failure(format!("cannot make {name}: {}", words.trim().trim_start_matches("qemu-img: "))))
    }

    fn run(
        &self,
        deed: &str,
        path: &Path,
        fixed: impl IntoIterator<Item = impl Into<OsString>>,
        rest: impl IntoIterator<Item = OsString>,
    ) -> Result<Vec<u8>, DriverError> {
        let mut command = Command::new("qemu-img");
        let rest: Vec<OsString> = rest.into_iter().collect();
        let names: Vec<String> = rest.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        command.args(fixed.into_iter().map(Into::into)).args(rest);
        command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.stop.check()?;
        let writes = deed != LOOK;
        let done = self.confine(&mut command, BOUNDS).and_then(|behind| {
            let done = apart::without(|| behind.enter().and_then(|()| finish(&mut command, &self.stop, writes)));
            done.map_err(|e| behind.why(e))
        });
        let done = done.map_err(|e| not_run("qemu-img", NOT_INSTALLED, e))?;
        if done.status.success() {
            return Ok(done.stdout);
        }
        let shown = path.display().to_string();
        let words = names.iter().fold(String::from_utf8_lossy(&done.stderr).into_owned(), |words, name| {
            // The whole chain is no name for people.
            if name.starts_with("json:") { words.replace(name, &shown) } else { words }
        });
        Err(failure(format!("cannot {deed} {shown}: {}", words.trim().trim_start_matches("qemu-img: "))))
    }
}

/// Why the tool could not be run; `missing` is said where there is no such program.
pub(super) fn not_run(tool: &str, missing: &str, error: io::Error) -> DriverError {
    match error.kind() {
        io::ErrorKind::NotFound => DriverError::Unsupported(missing.to_owned()),
        _ => DriverError::Storage(format!("{tool}: {error}")),
    }
}

/// What it said when it failed.
pub(super) fn failure(text: String) -> DriverError {
    let full = text.contains("No space left") || text.contains("Disk quota exceeded");
    if full { DriverError::NoSpace(text) } else { DriverError::Storage(text) }
}

impl Images {
    /// Has a tool that is about to be started run by these rights, within these bounds, behind its wall.
    pub(super) fn confine(&self, command: &mut Command, bounds: Bounds) -> io::Result<Behind> {
        behind::confine(command, self.lender.user(), self.wall(), bounds)
    }

    /// Behind which the tool runs: it finds what is lent now.
    fn wall(&self) -> Wall {
        let lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        // What is read by one and written by another is written.
        let mut files: Vec<LentFile> = lent.iter().flat_map(|(_, files)| files.iter().cloned()).collect();
        files.sort_by_key(|file| file.write);
        Wall { files, ..Wall::default() }
    }
}

/// What the tool writes an image to: its output, which is a file. A tool that fails removes by its name what it has begun, and
/// there nothing can be removed; `/dev/stdout` is a link of the host's, which could.
pub const TOOL_OUTPUT: &str = "/proc/self/fd/1";

/// Writes a raw image of some megabytes into `to`, which is empty, as qcow2: with the rights of `user`, who must be able to
/// read the one and to write the other, and behind a wall; with ours, if `None`. The program finds both open, and no other file.
/// Ends soon after it is told to stop, with an error. Blocks.
pub fn convert(from: &File, to: &File, user: Option<&RunAs>, stop: &Stop) -> io::Result<()> {
    let done = apart::without(|| {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", "qcow2", "/dev/stdin", TOOL_OUTPUT]);
        command.env("LC_ALL", "C").stdin(apart::fetch(from)?).stdout(apart::fetch(to)?).stderr(Stdio::piped());
        tame(&mut command, user.map(Into::into), Bounds { cpu: Some(CONVERSION), ..BOUNDS });
        if user.is_some() {
            // From there nothing is fetched any more.
            Wall::default().enter(None)?;
        }
        // What it has written by then is thrown away.
        finish(&mut command, stop, false)
    });
    let done = done.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => io::Error::other(NOT_INSTALLED),
        _ => e,
    })?;
    if done.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    Err(io::Error::other(if words.is_empty() { format!("qemu-img: {}", done.status) } else { words }))
}

fn wants(images: &[(PathBuf, bool)]) -> Vec<Want> {
    images.iter().map(|(path, write)| Want { path: path.clone(), write: *write, device: false }).collect()
}

/// Names an image and all it stands on, from the topmost down to the last, without leaving anything to be found in a header.
pub fn named(chain: &[(PathBuf, String)]) -> OsString {
    format!("json:{}", node(chain)).into()
}

/// The same as QEMU's options of a node.
pub(super) fn node(chain: &[(PathBuf, String)]) -> Value {
    let mut below = Value::Null;
    for (path, format) in chain.iter().rev() {
        let is_device = Found::resolve(path).is_ok_and(|found| found.kind() == FileType::BlockDevice);
        let driver = if is_device { "host_device" } else { "file" };
        let mut node = json!({ "driver": format, "file": { "driver": driver, "filename": path.to_string_lossy() } });
        if matches!(&**format, "qcow2" | "qcow" | "qed" | "vmdk") {
            node["backing"] = below;
        }
        below = node;
    }
    below
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::workers::{Errand, PATIENCE, Workers};
    use std::time::Duration;
    use tokio_util::sync::CancellationToken;

    /// W3: a pipe whose other end nobody opens.
    #[tokio::test]
    async fn a_tool_that_hangs_is_cancelled_and_has_a_limit() {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            return eprintln!("SKIPPED: qemu-img is not installed");
        }
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("disk");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let (workers, images) = (Workers::default(), Images::new(Lender::Ours, Uuid::from_u128(1), None));
        for (limit, is_cancelled) in [(PATIENCE, true), (Duration::from_millis(500), false)] {
            let (cancel, started) = (CancellationToken::new(), Arc::new(tokio::sync::Notify::new()));
            let errand = Errand { limit, ..Errand::new(images.guest, "disk").until(&cancel) };
            let (images, path, begins) = (images.clone(), pipe.clone(), started.clone());
            let look = workers.run(errand, move |stop| {
                begins.notify_one();
                let _lent = images.lend(&[(path.clone(), false)])?;
                images.within(stop).info(&path, "qcow2")
            });
            let cancelling = async {
                if is_cancelled {
                    started.notified().await;
                    cancel.cancel();
                }
            };
            let error = tokio::join!(look, cancelling).0.unwrap_err();
            assert_eq!(matches!(error, DriverError::Cancelled), is_cancelled, "{error}");
            assert_eq!(matches!(error, DriverError::TimedOut(_)), !is_cancelled, "{error}");
        }
        // Nothing of it is left that would keep the machine.
        workers.run(Errand::new(images.guest, "disk"), |_| Ok(())).await.unwrap();
    }

    /// A conversion has the rights of whom it is for: root's files are not opened for them.
    #[test]
    fn a_conversion_has_no_rights_of_ours() {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            return eprintln!("SKIPPED: qemu-img is not installed");
        }
        let (true, Ok(nobody)) = (nix::unistd::geteuid().is_root(), RunAs::look_up("nobody", None, &[])) else {
            return eprintln!("SKIPPED: needs root and a user nobody");
        };
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let private = |name: &str| {
            let mut options = File::options();
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            options.read(true).write(true).create_new(true).open(at(name)).unwrap()
        };
        let (from, to) = (private("from"), private("to"));
        from.set_len(1 << 20).unwrap();
        let convert = |user| convert(&from, &to, user, &Stop::default());
        let refused = convert(Some(&nobody)).unwrap_err().to_string();
        assert!(refused.contains("Permission denied"), "{refused}");
        assert_eq!(to.metadata().unwrap().len(), 0);
        for file in [&from, &to] {
            std::os::unix::fs::fchown(file, Some(nobody.uid), Some(nobody.gid)).unwrap();
        }
        convert(Some(&nobody)).unwrap();
        assert_eq!(std::fs::read(at("to")).unwrap()[..4], *b"QFI\xfb");
    }

    /// A pipe whose other end nobody opens.
    #[tokio::test]
    async fn a_conversion_that_hangs_has_a_limit() {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            return eprintln!("SKIPPED: qemu-img is not installed");
        }
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("template");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let from = rustix::fs::open(&pipe, rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK, 0.into());
        let (from, to) = (File::from(from.unwrap()), tempfile::tempfile().unwrap());
        let errand = Errand { limit: Duration::from_millis(500), ..Errand::new(Uuid::from_u128(1), "template") };
        let convert =
            move |stop: &Arc<Stop>| convert(&from, &to, None, stop).map_err(|e| DriverError::Storage(e.to_string()));
        let error = Workers::default().run(errand, convert).await.unwrap_err();
        assert!(matches!(error, DriverError::TimedOut(_)), "{error}");
    }
}
