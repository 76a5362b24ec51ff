//! A folder that another host shares, which is mounted for a pool of type netfs. The tool that mounts it takes a path, so it does that
//! in a folder of ours; what was mounted there is taken from it by its descriptor.

use super::mount_table::Line;
use super::mounts::{Means, take_away};
use super::sources::standing_for;
use super::{HostStorage, failed};
use crate::host::resolve::Place;
use crate::host::shares::{self, Login, Protocol};
use crate::host::wall::{Hold, clone};
use crate::host::workers::{Errand, Stop};
use rustix::fs::{AtFlags, unlinkat};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::storage::pool::{PoolDef, PoolKind, PoolSource};
use virt_model::storage::{FormatDoc, PathDoc};
use virt_model::xml::{Finding, Place as At, shorten};
use zeroize::Zeroizing;

/// The formats that a pool's source can have: NFS if it says none.
pub const FORMATS: &[&str] = &["auto", "nfs", "cifs"];
/// Versions of NFS that are asked for.
const OF_NFS: &[&str] = &["3", "4", "4.0", "4.1", "4.2"];
/// Versions of CIFS that are asked for.
const OF_CIFS: &[&str] = &["1.0", "2.0", "2.1", "3", "3.0", "3.02", "3.1.1"];
/// How a password that is not sent as it is is called in libvirt's documents.
const PASSWORD: &str = "chap";

/// How long a share may take to be mounted: a server that has not answered by then is away.
pub const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// More leftovers than these are not looked for.
const MOST: usize = 10_000;

/// In our folder for what ends with us: where shares are mounted for a moment.
const ASIDE: &str = "shares";

/// See the module.
#[derive(Debug)]
pub struct Share {
    protocol: Protocol,
    /// As the kernel's table of mounts has it.
    source: PathBuf,
    version: Option<String>,
    /// Who comes, and the secret that proves it.
    login: Option<(String, Uuid)>,
}

/// What of a pool's server or folder cannot be mounted, whatever is on the host.
pub fn refused(def: &PoolDef) -> Vec<Finding> {
    let Some(source) = &def.source else { return Vec::new() };
    let mut findings = Vec::new();
    let mut refuse = |at: &At, text: String| findings.push(Finding::unsupported(at, text));
    let format = source.format.as_ref().filter(|format| !FORMATS.contains(&&*format.kind));
    if let Some(format) = format {
        let text = format!("folders of other hosts are mounted by nfs and cifs, and not by '{}'", format.kind);
        refuse(&format.at.attribute("type"), text);
    }
    for (number, host) in source.hosts.iter().enumerate() {
        if number > 0 {
            refuse(&host.at, "a pool of type 'netfs' comes from one host: name that alone".to_owned());
        } else if let Err(why) = check_host(&host.name) {
            refuse(&host.at.attribute("name"), why);
        }
        if host.port.is_some() {
            refuse(&host.at.attribute("port"), "shares are mounted from the usual port: leave it out".to_owned());
        }
    }
    if let Some(dir) = &source.dir
        && let Err(why) = check_dir(&dir.path, protocol_of(source))
    {
        refuse(&dir.at.attribute("path"), why);
    }
    let known = if protocol_of(source) == Protocol::Nfs { OF_NFS } else { OF_CIFS };
    if let Some(asked) = source.protocol.as_ref().filter(|asked| !known.contains(&&*asked.version)) {
        let text = format!("version '{}' is not one of {}", shorten(&asked.version), known.join(", "));
        refuse(&asked.at.attribute("ver"), text);
    }
    if let Some((at, why)) = refused_login(source) {
        refuse(&at, why);
    }
    findings
}

/// What of a document that says whom to ask is not asked for.
fn refused_of_search(asked: &PoolSource) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut refuse = |at: &At, text: &str| findings.push(Finding::unsupported(at, text.to_owned()));
    if let Some(second) = asked.hosts.get(1) {
        refuse(&second.at, "one host is asked at a time: name that alone");
    }
    if let Some(host) = asked.hosts.iter().find(|host| host.port.is_some()) {
        refuse(&host.at.attribute("port"), "hosts are asked at the usual port: leave it out");
    }
    if let Some(format) = asked.format.as_ref().filter(|format| !matches!(&*format.kind, "auto" | "nfs")) {
        refuse(&format.at.attribute("type"), "hosts are asked what they offer by nfs alone: leave it out");
    }
    let others = [
        asked.devices.first().map(|said| &said.at),
        asked.dir.as_ref().map(|said| &said.at),
        asked.adapter.as_ref().map(|said| &said.at),
        asked.initiator.as_ref().map(|said| &said.at),
        asked.protocol.as_ref().map(|said| &said.at),
        asked.auth.as_ref().map(|said| &said.at),
    ];
    for at in others.into_iter().flatten() {
        refuse(at, "a search on a host has its <host name='…'/> and nothing else: leave it out");
    }
    if asked.name.is_some() {
        refuse(&asked.at.child("name"), "a search on a host has its <host name='…'/> and nothing else: leave it out");
    }
    findings
}

/// Why nobody can come so, and where it says that.
fn refused_login(source: &PoolSource) -> Option<(At, String)> {
    let auth = source.auth.as_ref()?;
    let why = match protocol_of(source) {
        Protocol::Nfs => "servers of NFS know hosts and no passwords: leave it out".to_owned(),
        Protocol::Cifs if auth.kind != PASSWORD => format!("a password for cifs is of type '{PASSWORD}'"),
        Protocol::Cifs if !is_user(&auth.username) => {
            let text = "is no user's name for cifs: it is not empty, has no blanks at its ends, no control characters, and none of , % / \\";
            format!("'{}' {text}", shorten(&auth.username))
        }
        Protocol::Cifs if auth.secret.as_ref().and_then(|secret| secret.uuid).is_none() => {
            "say by <secret uuid='…'/> which secret is the password".to_owned()
        }
        Protocol::Cifs => return None,
    };
    Some((auth.at.clone(), why))
}

/// Whether it can be a host's name or address. The error is a sentence.
fn check_host(name: &str) -> Result<(), String> {
    let plain = name
        .chars()
        .all(|sign| sign.is_ascii_alphanumeric() || matches!(sign, '.' | '-' | '_' | ':' | '%' | '[' | ']'));
    match plain && !name.is_empty() && !name.starts_with('-') {
        true => Ok(()),
        false => Err(format!("'{}' is no name or address of a host", shorten(name))),
    }
}

/// Whether a user can be called that. What mounts cifs takes some signs for the end of a name, or of an option.
fn is_user(name: &str) -> bool {
    let has_odd = name.chars().any(|sign| sign.is_control() || matches!(sign, ',' | '%' | '/' | '\\'));
    !name.is_empty() && name.trim() == name && !has_odd
}

fn check_dir(dir: &str, protocol: Protocol) -> Result<(), String> {
    if dir.chars().any(char::is_control) {
        return Err("a path has no control characters".to_owned());
    }
    match protocol {
        Protocol::Nfs if !dir.starts_with('/') => Err(format!("'{}' is no absolute path", shorten(dir))),
        Protocol::Cifs if dir.trim_matches('/').is_empty() => Err("name the share".to_owned()),
        Protocol::Cifs if dir.contains('\\') => Err("folders below a share are told apart by '/'".to_owned()),
        Protocol::Cifs if dir.contains(',') || dir.trim() != dir => {
            let text = "cannot be mounted by cifs, which takes what follows a comma for an option, and no blanks at its ends: share \
                        the folder by another name";
            Err(format!("'{}' {text}", shorten(dir)))
        }
        _ => Ok(()),
    }
}

fn protocol_of(source: &PoolSource) -> Protocol {
    match source.format.as_ref().is_some_and(|format| format.kind == "cifs") {
        true => Protocol::Cifs,
        false => Protocol::Nfs,
    }
}

/// Why no share is mounted here, if so.
pub fn lacks() -> Option<String> {
    Some(format!("{}, and {}", Protocol::Nfs.lacks()?, Protocol::Cifs.lacks()?))
}

impl Share {
    /// What a pool of that type comes from; `None`: it is another type's.
    pub fn of(def: &PoolDef) -> Option<Share> {
        let source = def.source.as_ref().filter(|_| def.kind == PoolKind::Netfs)?;
        let login = source.auth.as_ref().and_then(|auth| Some((auth.username.clone(), def.secret()?)));
        let version = source.protocol.as_ref().map(|asked| asked.version.clone());
        Some(Share { protocol: protocol_of(source), source: def.mounted_source()?.into(), version, login })
    }

    /// Where it comes from.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// Whether a line of the table is of it: the kernel takes from nobody but root what is called so.
    pub fn is_of(&self, line: &Line) -> bool {
        let plain = |path: &Path| path.to_string_lossy().trim_end_matches('/').to_owned();
        self.protocol.file_systems().contains(&&*line.kind) && plain(&line.source) == plain(&self.source)
    }

    /// The folder of a share of CIFS that is mounted, if not all of it: the kernel may show it as one of a larger file system.
    pub fn folder_within(&self) -> Option<PathBuf> {
        let source = self.source.to_str().filter(|_| self.protocol == Protocol::Cifs)?;
        let below = source.trim_start_matches('/').splitn(3, '/').nth(2)?;
        Some(Path::new("/").join(below))
    }

    /// A mount of it that is nowhere yet, for that pool. Device nodes and programs in it are none. Blocks, until it is told to stop.
    pub fn mount(&self, pool: Uuid, means: &Means<'_>) -> Result<OwnedFd, DriverError> {
        let login = self.login.as_ref().map(|(user, secret)| {
            let password = Zeroizing::new((means.secrets)(&secret.to_string())?);
            Ok::<_, DriverError>(Login { user: user.clone(), password })
        });
        let login = login.transpose()?;
        let at = means.runtime.join(ASIDE).join(pool.to_string());
        let aside = Aside::new(&at).map_err(|e| failed("make", &at, &e))?;
        let source = self.source.to_string_lossy();
        shares::mount(self.protocol, (&source, &at), self.version.as_deref(), login.as_ref(), means.stop)?;
        aside.taken().map_err(|e| failed("take the mount from", &at, &e))
    }
}

/// A folder of ours on which something is mounted for a moment.
struct Aside<'a> {
    at: &'a Path,
    place: Place,
}

impl Aside<'_> {
    /// Makes it. What somebody has left there who was killed goes.
    fn new(at: &Path) -> io::Result<Aside<'_>> {
        if let Some(above) = at.parent() {
            make_private(above)?;
        }
        let aside = Aside { at, place: Place::resolve(at, true)? };
        aside.clear()?;
        aside.place.make_folder(0o700)?;
        Ok(aside)
    }

    /// What is mounted on it, as a mount that is nowhere.
    fn taken(self) -> io::Result<OwnedFd> {
        let hold = Hold { no_devices: true, no_programs: true, read_only: false };
        clone(self.place.open_folder()?, false, hold)
    }

    fn clear(&self) -> io::Result<()> {
        while is_done(take_away(self.at, UnmountFlags::DETACH), &[Errno::INVAL, Errno::NOENT])? {}
        let removed = unlinkat(self.place.folder_fd(), self.place.name(), AtFlags::REMOVEDIR);
        is_done(removed.map_err(io::Error::from), &[Errno::NOENT])?;
        Ok(())
    }
}

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            tracing::warn!("{} is mounted in vain, and stays until its pool is started: {error}", self.at.display());
        }
    }
}

/// Makes a folder in which nobody but us reaches anything: what is mounted on one in it may let everybody in.
fn make_private(path: &Path) -> io::Result<()> {
    if let Some(above) = path.parent() {
        Place::make_folders(above, true)?;
    }
    let place = Place::resolve(path, true)?;
    match place.make_folder(0o700) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        made => return made.map(drop),
    }
    let folder = place.open_folder()?;
    match folder.stat()?.st_uid == rustix::process::geteuid().as_raw() {
        true => folder.set_mode(0o700),
        false => Err(io::Error::other(format!("{} is somebody else's: remove it", path.display()))),
    }
}

/// Takes away what may be left where that pool's share was mounted for a moment. Blocks.
pub fn clear_aside(runtime: &Path, pool: Uuid) {
    clear_left(&runtime.join(ASIDE).join(pool.to_string()));
}

/// The same for all pools, before any is opened: somebody was killed while shares were being mounted. Blocks.
pub fn clear_asides(runtime: &Path) {
    let above = runtime.join(ASIDE);
    let names =
        Place::resolve(&above, true).and_then(|place| place.open_folder()).and_then(|folder| folder.names(MOST));
    let is_pools = |name: &OsString| name.to_str().is_some_and(|name| Uuid::try_parse(name).is_ok());
    for name in names.unwrap_or_default().into_iter().filter(is_pools) {
        clear_left(&above.join(name));
    }
}

fn clear_left(at: &Path) {
    let cleared = Place::resolve(at, true).and_then(|place| Aside { at, place }.clear());
    if let Err(error) = cleared.or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) }) {
        tracing::warn!("{} is mounted in vain, and stays until its pool is started: {error}", at.display());
    }
}

/// Whether something was done; where there was nothing to be done that is no error.
fn is_done(done: io::Result<()>, nothing: &[Errno]) -> io::Result<bool> {
    match done {
        Ok(()) => Ok(true),
        Err(e) if nothing.iter().any(|errno| e.raw_os_error() == Some(errno.raw_os_error())) => Ok(false),
        Err(e) => Err(e),
    }
}

impl HostStorage {
    /// What the server that is asked offers by NFS.
    pub(super) async fn offered(&self, asked: Option<&PoolSource>) -> Result<Vec<PoolSource>, DriverError> {
        let host = asked.and_then(|asked| asked.hosts.first()).cloned().ok_or_else(|| {
            let text = "say in the document which server is asked: <source><host name='…'/></source>";
            DriverError::Argument(text.to_owned())
        })?;
        check_host(&host.name).map_err(DriverError::Argument)?;
        let findings = asked.map(refused_of_search).unwrap_or_default();
        if !findings.is_empty() {
            return Err(DriverError::Config(findings));
        }
        let _one_at_a_time = self.asks.lock().await;
        let errand = Errand::new(standing_for(Path::new(&host.name)), host.name.clone());
        let name = host.name.clone();
        let mut found = self.workers.run(errand, move |stop: &Arc<Stop>| shares::offered(&name, stop)).await?;
        found.retain(|dir| check_dir(dir, Protocol::Nfs).is_ok());
        let source = |path: String| PoolSource {
            hosts: vec![host.clone()],
            dir: Some(PathDoc { path, ..PathDoc::default() }),
            format: Some(FormatDoc { kind: "nfs".to_owned(), ..FormatDoc::default() }),
            ..PoolSource::default()
        };
        Ok(found.into_iter().map(source).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(source: &str) -> PoolDef {
        let xml = format!(
            "<pool type='netfs'><name>p</name><source>{source}</source><target><path>/p</path></target></pool>"
        );
        PoolDef::parse(&xml).unwrap()
    }

    fn share(host: &str, dir: &str, format: &str) -> Share {
        Share::of(&pool(&format!("<host name='{host}'/><dir path='{dir}'/><format type='{format}'/>"))).unwrap()
    }

    #[test]
    fn what_cannot_be_mounted_is_refused_before_it_is_tried() {
        let refused = |source: &str| {
            let found: Vec<_> = refused(&pool(source)).into_iter().map(|found| found.message).collect();
            found.join("; ")
        };
        let nfs = "<host name='nas'/><dir path='/a'/><format type='nfs'/><protocol ver='4.1'/>";
        let login = "<auth type='chap' username='u'><secret uuid='5a0b1e0c-9a0d-4b52-9a8e-6f0f7c1d2e3f'/></auth>";
        let cifs = format!("<host name='nas'/><dir path='images'/><format type='cifs'/>{login}");
        assert_eq!((refused(nfs), refused(&cifs)), (String::new(), String::new()));
        for (source, why) in [
            (nfs.replace("nfs'", "glusterfs'"), "not by 'glusterfs'"),
            (format!("{nfs}<host name='other'/>"), "from one host"),
            (nfs.replace("'nas'", "'nas' port='2050'"), "the usual port"),
            (nfs.replace("'nas'", "'-o'"), "'-o' is no name or address of a host"),
            (nfs.replace("'nas'", "'a b'"), "is no name or address"),
            (nfs.replace("'/a'", "'a'"), "'a' is no absolute path"),
            (nfs.replace("4.1", "4.1,soft"), "is not one of 3, 4, 4.0"),
            (format!("{nfs}{login}"), "no passwords"),
            (cifs.replace("'images'", "'/'"), "name the share"),
            (cifs.replace("'images'", "'images,soft,vers=1.0'"), "takes what follows a comma for an option"),
            (cifs.replace("'images'", "'images '"), "no blanks at its ends"),
            (cifs.replace("'u'", "'u,sec=none'"), "'u,sec=none' is no user's name for cifs"),
            (cifs.replace("'u'", "'u%p'"), "is no user's name"),
            (cifs.replace("'u'", "'d\\u'"), "is no user's name"),
            (cifs.replace("'u'", "' u'"), "is no user's name"),
            (cifs.replace("'nas'", "'nas,soft'"), "is no name or address of a host"),
            (cifs.replace("chap", "ceph"), "is of type 'chap'"),
            (cifs.replace("uuid='5a0b1e0c-9a0d-4b52-9a8e-6f0f7c1d2e3f'", "usage='nas'"), "<secret uuid='…'/>"),
        ] {
            assert!(refused(&source).contains(why), "{why}: {}", refused(&source));
        }
    }

    #[test]
    fn a_search_takes_the_name_of_a_host_alone() {
        let told =
            |source: &str| refused_of_search(&PoolSource::parse(&format!("<source>{source}</source>")).unwrap()).len();
        let host = "<host name='nas'/>";
        assert_eq!((told(host), told(&format!("{host}<format type='nfs'/>"))), (0, 0));
        assert_eq!(told("<host name='nas' port='2049'/>"), 1);
        for more in
            ["<host name='b'/>", "<format type='cifs'/>", "<dir path='/a'/>", "<protocol ver='3'/>", "<name>a</name>"]
        {
            assert_eq!(told(&format!("{host}{more}")), 1, "{more}");
        }
        assert_eq!(told(&format!("{host}<auth type='chap' username='u'/>")), 1);
    }

    #[test]
    fn nobody_else_comes_to_where_a_share_is_mounted_and_what_is_left_there_goes() {
        use std::os::unix::fs::PermissionsExt as _;
        let runtime = tempfile::tempdir().unwrap();
        let above = runtime.path().join(ASIDE);
        let mode = || std::fs::metadata(&above).unwrap().permissions().mode() & 0o777;
        make_private(&above).unwrap();
        assert_eq!(mode(), 0o700);
        std::fs::set_permissions(&above, std::fs::Permissions::from_mode(0o711)).unwrap();
        make_private(&above).unwrap();
        assert_eq!(mode(), 0o700);
        let [one, other] = [Uuid::new_v4(), Uuid::new_v4()];
        let at = |name: &str| above.join(name);
        for name in [&*one.to_string(), &*other.to_string(), "else"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        clear_aside(runtime.path(), one);
        assert!(!at(&one.to_string()).exists() && at(&other.to_string()).exists());
        clear_asides(runtime.path());
        assert!(!at(&other.to_string()).exists() && at("else").exists());
        clear_aside(&runtime.path().join("nowhere"), one);
    }

    #[test]
    fn a_share_is_known_in_the_table_by_its_type_and_where_it_comes_from() {
        let line = |kind: &str, source: &str| Line {
            id: 1,
            device: (0, 40),
            root: "/".into(),
            at: "/p".into(),
            options: String::new(),
            kind: kind.to_owned(),
            source: source.into(),
        };
        let nfs = share("nas", "/a/", "nfs");
        assert!(nfs.is_of(&line("nfs4", "nas:/a")) && nfs.is_of(&line("nfs", "nas:/a/")));
        assert!(!nfs.is_of(&line("fuse.nfs", "nas:/a")) && !nfs.is_of(&line("nfs4", "nas:/a/b")));
        assert_eq!(share("fe80::1", "/a", "auto").source(), Path::new("[fe80::1]:/a"));
        let cifs = share("nas", "/images/a/b/", "cifs");
        assert!(cifs.is_of(&line("cifs", "//nas/images/a/b")));
        assert_eq!(cifs.folder_within().unwrap(), Path::new("/a/b"));
        assert_eq!((share("nas", "images", "cifs").folder_within(), nfs.folder_within()), (None, None));
    }
}
