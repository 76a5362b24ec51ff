//! What the processes of a guest find behind their wall, from their command lines and the machine.

use super::capabilities::KVM;
use super::plan::{Command, Companion, HostFile, Role};
use crate::host::access::LentFile;
use crate::host::pci::{VFIO_NODES, vfio_of_all};
use crate::host::wall::{Maker, Wall, obstacle};
use rustix::fs::FileType;
use std::io;
use std::path::{Path, PathBuf};
use virt_model::device::ControllerKind;
use virt_model::domain::DomainDef;

/// Names in arguments that are there for everybody, or for nobody.
const KNOWN: [&str; 4] = ["/usr", "/proc", "/sys", "/dev/pts"];

/// By whose rights a wall is made, and with them how what it shows is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mason(Maker);

impl Mason {
    /// Root, for users of guests.
    pub const ROOT: Mason = Mason(Maker::Root);

    /// Ourselves, for guests that run as we do; where this host does not let us, guests have the rest of a wall only. The first
    /// call tries, and says so in the log.
    pub fn ours() -> Mason {
        match obstacle() {
            None => Mason(Maker::Own),
            Some(why) => {
                static SAID: std::sync::Once = std::sync::Once::new();
                SAID.call_once(|| {
                    tracing::warn!(
                        "guests of this session see all that its user does, since this host lets nobody but root make user \
                         namespaces: {why}"
                    );
                });
                Mason(Maker::Nobody)
            }
        }
    }

    /// What is at `path`, with the rights that it has; a link of somebody's leads root only to what is theirs.
    fn find(self, path: &Path, write: bool) -> io::Result<Option<LentFile>> {
        match self.0 {
            Maker::Root => LentFile::unlent(path, write),
            Maker::Own | Maker::Nobody => LentFile::ours(path, write),
        }
    }

    /// The folder of what is to be made there: who names a place of their own for it gives the guest that folder. Root's guests
    /// have none but their own.
    fn room_for(self, path: &Path) -> io::Result<Option<LentFile>> {
        let folder = path.parent().filter(|folder| self != Mason::ROOT && folder.parent().is_some());
        let found = folder.map_or(Ok(None), |folder| self.find(folder, true))?;
        Ok(found.filter(|found| found.kind() == FileType::Directory))
    }

    /// What is on the host of those kinds under names in these arguments. It is shown with the rights that it has.
    fn named(
        self,
        arguments: impl Iterator<Item = String>,
        kinds: impl Fn(FileType) -> bool,
    ) -> io::Result<Vec<LentFile>> {
        let mut files = Vec::new();
        for argument in arguments {
            for name in paths_in(&argument) {
                files.extend(self.find(&name, true)?.filter(|file| kinds(file.kind())));
            }
        }
        Ok(files)
    }
}

/// That of QEMU. `lent` are the files that it was lent, `own` is its own folder. Blocks.
pub fn of_qemu(mason: Mason, def: &DomainDef, command: &Command, lent: &[LentFile], own: &Path) -> io::Result<Wall> {
    let args = command.all_args();
    if mason == Mason(Maker::Nobody) {
        return Ok(Wall { maker: Maker::Nobody, uring: uses_uring(&args), ..Wall::default() });
    }
    let elsewhere: Vec<PathBuf> = sockets_made(&args).into_iter().filter(|socket| !socket.starts_with(own)).collect();
    if let (Mason::ROOT, Some(socket)) = (mason, elsewhere.first()) {
        let why = format!(
            "{}: QEMU makes sockets in the guest's own folder only; leave their path out of the definition, or have the other end listen",
            socket.display()
        );
        return Err(io::Error::new(io::ErrorKind::Unsupported, why));
    }
    let mut wall = Wall {
        programs: vec![command.program.clone()],
        network: takes_network(def, &args),
        kernel: !def.devices.hostdevs.is_empty()
            || def.devices.interfaces.iter().any(|card| card.host_card().is_some()),
        // Where a device of the host's may be plugged in while it runs.
        news_of_devices: def.devices.controllers.iter().any(|bus| bus.kind == ControllerKind::Usb),
        nodes: nodes(def, &command.files, lent),
        uring: uses_uring(&args),
        maker: mason.0,
        ..Wall::default()
    };
    let shared = def.devices.filesystems.iter().filter(|shared| !shared.is_virtiofs());
    for shared in shared {
        let Some(folder) = shared.folder() else { continue };
        let found = mason.find(Path::new(folder), !shared.readonly)?;
        wall.files.extend(found.filter(|found| found.kind() == FileType::Directory));
    }
    let native = def.native.iter().flat_map(|native| {
        let arguments = native.arguments.iter().map(|argument| argument.value.clone());
        arguments.chain(native.environment.iter().filter_map(|variable| variable.value.clone()))
    });
    for argument in native {
        for name in paths_in(&argument) {
            wall.files.extend(mason.find(&name, true)?.map_or_else(|| mason.room_for(&name), |there| Ok(Some(there)))?);
        }
    }
    let ends = |kind| matches!(kind, FileType::Socket | FileType::CharacterDevice | FileType::Fifo);
    wall.files.extend(mason.named(args.into_iter(), ends)?);
    for socket in &elsewhere {
        wall.files.extend(mason.room_for(socket)?);
    }
    wall.folder(own, true)?;
    // What was judged comes last: it covers what a name means otherwise. What is read and written is written.
    let mut lent = lent.to_vec();
    lent.sort_by_key(|file| file.write);
    wall.files.extend(lent);
    Ok(wall)
}

/// That of a companion. Blocks.
pub fn of_companion(mason: Mason, companion: &Companion, lent: &[LentFile], own: &Path) -> io::Result<Wall> {
    let shuts_itself_in = companion.needs_network || companion.privileged;
    if mason != Mason::ROOT && (shuts_itself_in || mason == Mason(Maker::Nobody)) {
        return Ok(Wall { maker: Maker::Nobody, shuts_itself_in, ..Wall::default() });
    }
    let mut wall = Wall { programs: vec![companion.program.clone()], scratch: true, maker: mason.0, ..Wall::default() };
    // passt is the guest's way to the network; it and virtiofsd shut themselves in, for which they ask the kernel more.
    wall.network = companion.needs_network;
    wall.kernel = companion.needs_network || companion.privileged;
    wall.shuts_itself_in = shuts_itself_in;
    wall.folder(own, true)?;
    let work = match &companion.role {
        Role::Maker { work, .. } => Some(work),
        _ => None,
    };
    for folder in companion.folders.iter().chain(work) {
        wall.folder(folder, true)?;
    }
    wall.files.extend(mason.named(companion.args.iter().cloned(), |kind| kind == FileType::Directory)?);
    let own = |file: &&LentFile| companion.files.iter().any(|one| one.path == file.path);
    wall.files.extend(lent.iter().filter(own).cloned());
    Ok(wall)
}

/// Sockets that QEMU is told to make by a path.
fn sockets_made(args: &[String]) -> Vec<PathBuf> {
    let socket = |option: &str, value: &str| {
        let key = match option {
            "-chardev" if value.contains(",server=on") => "path=",
            "-vnc" if value.starts_with("vnc=") => "vnc=unix:",
            "-vnc" => "unix:",
            "-spice" if value.contains("unix=on") => "addr=",
            _ => return None,
        };
        let whole = value.replace(",,", "\0");
        let path = whole.split(',').find_map(|word| word.strip_prefix(key))?.replace('\0', ",");
        Some(PathBuf::from(path))
    };
    args.windows(2).filter_map(|pair| socket(&pair[0], &pair[1])).collect()
}

/// Whether the definition asks for io_uring: there are few parts of the kernel in which more has been found.
fn uses_uring(args: &[String]) -> bool {
    args.iter().any(|arg| arg.contains("io_uring"))
}

/// Whether something in that machine talks to the host's network by QEMU itself, which opened devices do not.
fn takes_network(def: &DomainDef, args: &[String]) -> bool {
    let native = def.native.as_ref().is_some_and(|native| !native.arguments.is_empty());
    // An adapter that is plugged in again is heard of over the network of the host.
    let plugged = !def.devices.hostdevs.is_empty();
    native || plugged || reach_the_network(args)
}

/// Whether what these arguments make is reached by the network of the host.
pub fn reach_the_network(args: &[String]) -> bool {
    let value = |option: &str, value: &str| match option {
        "-netdev" => !value.starts_with("tap,") && !value.starts_with("vhost-user,") && !value.contains("addr.type=fd"),
        "-chardev" => value.contains(",host=") || value.contains(",localaddr=") || value.contains(",port="),
        "-vnc" => !value.trim_start_matches("vnc=").starts_with("unix:") && value != "none",
        "-spice" => ["port=", "tls-port="]
            .iter()
            .any(|key| value.split(',').any(|word| word.strip_prefix(key).is_some_and(|port| port != "0"))),
        "-blockdev" => {
            ["\"inet\"", "\"url\"", "\"portal\"", "\"driver\":\"rbd\""].iter().any(|sign| value.contains(sign))
        }
        _ => false,
    };
    args.windows(2).any(|pair| value(&pair[0], &pair[1]))
}

/// Devices with rights of their own.
fn nodes(def: &DomainDef, files: &[HostFile], lent: &[LentFile]) -> Vec<PathBuf> {
    let mut nodes = Vec::new();
    if def.kind == "kvm" {
        nodes.push(KVM.into());
    }
    let below = |folder: &str| {
        lent.iter().any(|file| file.path.starts_with(folder)) || files.iter().any(|file| file.path.starts_with(folder))
    };
    if below(VFIO_NODES) {
        nodes.push(vfio_of_all());
    }
    if !def.devices.audios.is_empty() {
        nodes.extend(["/dev/snd".into(), "/dev/dsp".into()]);
    }
    nodes
}

/// The absolute paths in an argument, in QEMU's ways to write them.
fn paths_in(argument: &str) -> Vec<PathBuf> {
    let whole = argument.replace(",,", "\0");
    let words = whole.split(|c: char| ",=\"".contains(c)).map(|word| word.replace('\0', ","));
    let words = words.flat_map(|word| match word.split_once(':') {
        Some((_, rest)) if rest.starts_with('/') => vec![rest.to_owned(), word.clone()],
        _ => vec![word],
    });
    let paths = words.filter(|word| word.starts_with('/') && !word.trim_matches('/').is_empty()).map(PathBuf::from);
    paths.filter(|path| !KNOWN.iter().any(|known| path.starts_with(known))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_however_they_are_written() {
        let found = |argument: &str| paths_in(argument).iter().map(|p| p.display().to_string()).collect::<Vec<_>>();
        assert_eq!(found("socket,id=a,path=/srv/a,,b.sock,server=on"), ["/srv/a,b.sock"]);
        assert_eq!(found("unix:/guests/vnc.sock,password=on"), ["/guests/vnc.sock"]);
        assert_eq!(found(r#"{"driver":"nbd","server":{"type":"unix","path":"/run/nbd"}}"#), ["/run/nbd"]);
        assert_eq!(found("path=/usr/share/x,b=/,c=a/b"), Vec::<String>::new());
    }

    #[test]
    fn sockets_that_it_is_to_make_are_known() {
        let made = |option: &str, value: &str| sockets_made(&[option.to_owned(), value.to_owned()]);
        let serial = "socket,id=a,path=/srv/a,,b.sock,server=on,wait=off,logfile=/srv/a.log,logappend=off";
        assert_eq!(made("-chardev", serial), [PathBuf::from("/srv/a,b.sock")]);
        assert_eq!(made("-vnc", "unix:/guests/vnc.sock,audiodev=audio1"), [PathBuf::from("/guests/vnc.sock")]);
        assert!(made("-chardev", "socket,id=chr-vu-fs2,path=/guests/fs2.sock").is_empty());
        assert!(made("-chardev", "socket,id=mon,fd=3,server=on,wait=off").is_empty());
        assert_eq!(made("-vnc", "vnc=unix:/guests/a=b.sock"), [PathBuf::from("/guests/a=b.sock")]);
        assert!(made("-vnc", "127.0.0.1:0,password=on").is_empty());
    }

    #[test]
    fn only_what_talks_to_the_hosts_network_has_it() {
        let def = DomainDef::default();
        let takes = |option: &str, value: &str| takes_network(&def, &[option.to_owned(), value.to_owned()]);
        for (option, value) in [
            ("-netdev", "user,id=hostnet0"),
            ("-netdev", "socket,listen=127.0.0.1:45558,id=hostnet4"),
            ("-chardev", "socket,id=charserial0,host=127.0.0.1,port=0,telnet=on,server=on,wait=off"),
            ("-chardev", "udp,id=charrng1,host=127.0.0.1,port=15907"),
            ("-vnc", "127.0.0.1:0,password=on"),
            ("-spice", "port=5900,addr=0.0.0.0"),
            ("-blockdev", r#"{"driver":"nbd","server":{"type":"inet","host":"h"}}"#),
            ("-blockdev", r#"{"driver":"https","url":"https://h/x"}"#),
        ] {
            assert!(takes(option, value), "{option} {value}");
        }
        for (option, value) in [
            ("-netdev", "tap,fd=20,id=hostnet0,vhost=on,vhostfd=21"),
            ("-netdev", "stream,id=hostnet1,server=off,addr.type=fd,addr.str=150"),
            ("-netdev", "vhost-user,chardev=charnet0,id=hostnet0"),
            ("-chardev", "socket,id=mon,fd=3,server=on,wait=off"),
            ("-vnc", "unix:/guests/vnc.sock"),
            ("-vnc", "vnc=unix:/guests/a=b.sock"),
            ("-spice", "port=0,disable-ticketing=on"),
            ("-blockdev", r#"{"driver":"file","filename":"/a"}"#),
        ] {
            assert!(!takes(option, value), "{option} {value}");
        }
    }
}
