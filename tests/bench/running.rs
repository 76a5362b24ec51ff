//! What is done with a guest that runs, beside libvirt: saved and restored, a disk plugged in and out, watched, spoken with.

use crate::bus::{Result, undefine};
use crate::common::client::{Domain, options};
use crate::common::console::Console;
use crate::common::guest::Tick;
use crate::libvirt::{Libvirt, Pair, timed};
use crate::{percentile, row};
use futures_util::future::join_all;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What is saved, in MiB; so much of it that no page is like another.
const SAVED: (u64, u64) = (256, 200);
/// Guests that are watched.
const WATCHED: usize = 20;
/// A disk on this can be taken out while firmware alone runs in the guest.
const CONTROLLER: &str = "<controller type='scsi' model='virtio-scsi'/>";
/// What runs and what is stored, as virtd does it unless it is told otherwise.
const LIVE_AND_CONFIG: u32 = 3;
/// libvirt-dbus cannot open a console: how long libvirt's own library takes, in seconds, a line each.
const CONSOLE: &str = "
import libvirt, sys, time
machine = libvirt.open('qemu:///system').lookupByName(sys.argv[1])
for _ in range(int(sys.argv[2])):
    begun = time.perf_counter()
    stream = machine.connect().newStream(0)
    machine.openConsole(None, stream, libvirt.VIR_DOMAIN_CONSOLE_FORCE)
    stream.send(b'x')
    stream.recv(1)
    print(time.perf_counter() - begun)
    stream.abort()
";

/// All of it, in turns.
pub async fn compare(libvirt: &Libvirt<'_>) -> Result<()> {
    saved(libvirt).await?;
    plugged(libvirt).await?;
    spoken_with(libvirt).await?;
    watched(libvirt).await
}

/// The same guest twice: virtd's and libvirt's, both started.
struct Twins {
    ours: Domain,
    theirs: String,
}

impl Twins {
    async fn start(libvirt: &Libvirt<'_>, xml: [&str; 2]) -> Result<Twins> {
        let ours = libvirt.bench().define(xml[0]).await;
        let theirs = libvirt.define(xml[1]).await?;
        ours.run("Start").await.map_err(|e| format!("{e:?}"))?;
        libvirt.domain(&theirs, "Create", &(0_u32,)).await?;
        Ok(Twins { ours, theirs })
    }

    async fn end(self, libvirt: &Libvirt<'_>) -> Result<()> {
        self.ours.run("Destroy").await.map_err(|e| format!("{e:?}"))?;
        libvirt.domain(&self.theirs, "Destroy", &(0_u32,)).await?;
        libvirt.domain(&self.theirs, "Undefine", &(0_u32,)).await?;
        undefine(&self.ours).await;
        Ok(())
    }
}

async fn saved(libvirt: &Libvirt<'_>) -> Result<()> {
    let daemon = &libvirt.bench().daemon;
    let (Some(one), Some(other)) = (Tick::new(daemon, "saved-ours", ""), Tick::new(daemon, "saved-theirs", "")) else {
        return Ok(());
    };
    let full = noise(daemon.folder())?;
    let twins = Twins::start(libvirt, [&grown(&one, &full), &grown(&other, &full)]).await?;
    let [mut save, mut restore] = [const { Pair::new() }; 2];
    for _ in 0..8 {
        one.goes_on().await;
        other.goes_on().await;
        let file = |name: &str| daemon.folder().join(name).display().to_string();
        let (ours, theirs) = (file("ours.saved"), file("theirs.saved"));
        let (time, done) = timed(twins.ours.call("Save", &(&ours, options([])))).await;
        done.map_err(|e| format!("{e:?}"))?;
        save.0.push(time);
        let (time, done) = timed(libvirt.domain(&twins.theirs, "Save", &(&theirs, "", 0_u32))).await;
        done?;
        save.1.push(time);
        let (time, done) =
            timed(twins.ours.client.call("/org/virt", "org.virt.Manager.RestoreDomain", &(&ours, options([])))).await;
        done.map_err(|e| format!("{e:?}"))?;
        restore.0.push(time);
        let body = (&theirs, "", 0_u32);
        let back = libvirt.call("/org/libvirt/QEMU", "org.libvirt.Connect", "DomainRestore", &body);
        let (time, done) = timed(back).await;
        done?;
        restore.1.push(time);
        std::fs::remove_file(ours)?;
        std::fs::remove_file(theirs)?;
    }
    save.show(&format!("Save, {} MiB of {} full", SAVED.0, SAVED.1));
    restore.show("the same: restore");
    twins.end(libvirt).await
}

/// A file that fills the memory of a guest.
fn noise(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("noise");
    let mut file = std::fs::File::create(&path)?;
    let mut word: u64 = 0x9e37_79b9_7f4a_7c15;
    for _ in 0..SAVED.1 {
        let mut block = Vec::with_capacity(1 << 20);
        while block.len() < 1 << 20 {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            block.extend_from_slice(&word.to_ne_bytes());
        }
        file.write_all(&block)?;
    }
    Ok(path)
}

/// A tick with memory, of which most is of that file.
fn grown(tick: &Tick, full: &Path) -> String {
    let loader = format!("loader,file={},addr=0x2000000,force-raw=on", full.display());
    tick.xml
        .replace("<domain type='qemu'>", "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>")
        .replace("<memory unit='MiB'>16", &format!("<memory unit='MiB'>{}", SAVED.0))
        .replace(
            "</domain>",
            &format!(
                "<qemu:commandline><qemu:arg value='-device'/><qemu:arg value='{loader}'/></qemu:commandline></domain>"
            ),
        )
}

async fn plugged(libvirt: &Libvirt<'_>) -> Result<()> {
    let daemon = &libvirt.bench().daemon;
    let ticks = ["plugged-ours", "plugged-theirs"].map(|name| Tick::new(daemon, name, ""));
    let [Some(one), Some(other)] = ticks else { return Ok(()) };
    let xml = [&one, &other].map(|tick| tick.xml.replace("</devices>", &format!("{CONTROLLER}</devices>")));
    let twins = Twins::start(libvirt, [&xml[0], &xml[1]]).await?;
    let disk = |tick: &Tick| -> Result<String> {
        let path = tick.disk.with_extension("more");
        std::fs::copy(&tick.disk, &path)?;
        Ok(format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
             <target dev='sdb' bus='scsi'/></disk>",
            path.display()
        ))
    };
    let (ours, theirs) = (disk(&one)?, disk(&other)?);
    let [mut attach, mut detach] = [const { Pair::new() }; 2];
    for _ in 0..20 {
        for (method, times) in [("AttachDevice", &mut attach), ("DetachDevice", &mut detach)] {
            let (time, done) = timed(twins.ours.call(method, &(&ours, options([])))).await;
            done.map_err(|e| format!("{e:?}"))?;
            times.0.push(time);
            let (time, done) = timed(libvirt.domain(&twins.theirs, method, &(&theirs, LIVE_AND_CONFIG))).await;
            done?;
            times.1.push(time);
        }
    }
    attach.show("AttachDevice of a disk");
    detach.show("DetachDevice of it (libvirt does not wait for the guest)");
    twins.end(libvirt).await
}

async fn spoken_with(libvirt: &Libvirt<'_>) -> Result<()> {
    let daemon = &libvirt.bench().daemon;
    let ticks = ["spoken-ours", "spoken-theirs"].map(|name| Tick::keys(daemon, name, ""));
    let [Some(one), Some(other)] = ticks else { return Ok(()) };
    let typed = |tick: &Tick| {
        let filed = format!("<serial type='file'><source path='{}'/>", tick.serial.display());
        tick.xml.replace(&filed, "<serial type='pty'>")
    };
    let twins = Twins::start(libvirt, [&typed(&one), &typed(&other)]).await?;
    // The guest is there when it has answered once.
    let mut first = Console::open(&twins.ours, "", &["log"]).await.map_err(|e| format!("{e:?}"))?;
    while !first.hears(1).contains('\n') {}
    drop(first);
    let mut open = Pair::new();
    for _ in 0..20 {
        let answered = async {
            let mut console = Console::open(&twins.ours, "", &["force"]).await?;
            console.types("x");
            Ok::<_, crate::common::client::Refusal>(console.hears(1))
        };
        let (time, heard) = timed(answered).await;
        assert_eq!(heard.map_err(|e| format!("{e:?}"))?, "x");
        open.0.push(time);
    }
    let mut script = libvirt.inside("python3");
    let output = script.args(["-c", CONSOLE, "spoken-theirs", "20"]).output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    let seconds = String::from_utf8(output.stdout)?;
    open.1 =
        seconds.lines().map(|line| line.parse().map(Duration::from_secs_f64)).collect::<std::result::Result<_, _>>()?;
    open.show("Console: open, type, hear it (libvirt: its C library)");
    twins.end(libvirt).await
}

async fn watched(libvirt: &Libvirt<'_>) -> Result<()> {
    let daemon = &libvirt.bench().daemon;
    let mut twins = Vec::new();
    for number in 0..WATCHED {
        let ticks = ["ours", "theirs"].map(|whose| Tick::new(daemon, &format!("watched-{number}-{whose}"), ""));
        let [Some(one), Some(other)] = ticks else { return Ok(()) };
        // Twenty that write all the time would be what is measured.
        let idle = |tick: &Tick| std::fs::write(&tick.disk, []).and_then(|()| blank(&tick.disk));
        idle(&one)?;
        idle(&other)?;
        twins.push(Twins::start(libvirt, [&one.xml, &other.xml]).await?);
    }
    let mut all = Pair::new();
    for _ in 0..20 {
        all.0.push(asked_of_all(&twins).await?);
        let body = (0_u32, 0_u32);
        let theirs = libvirt.call("/org/libvirt/QEMU", "org.libvirt.Connect", "GetAllDomainStats", &body);
        let (time, answer) = timed(theirs).await;
        answer?;
        all.1.push(time);
    }
    let well = percentile(&mut all.0, 50);
    all.show(&format!("Statistics of {WATCHED} guests"));
    let hung = daemon.qemu_of("watched-0-ours").ok_or("QEMU not found")?;
    nix::sys::signal::kill(hung, nix::sys::signal::Signal::SIGSTOP)?;
    // Whoever asks first finds out.
    asked_of_all(&twins).await?;
    let mut beside = Vec::new();
    for _ in 0..20 {
        beside.push(asked_of_all(&twins).await?);
    }
    row("virtd: the same while one of them hangs, against before", percentile(&mut beside, 50), well, 1.2);
    nix::sys::signal::kill(hung, nix::sys::signal::Signal::SIGCONT)?;
    for twin in twins {
        twin.end(libvirt).await?;
    }
    Ok(())
}

/// How long it takes until all have answered that are asked at once.
async fn asked_of_all(twins: &[Twins]) -> Result<Duration> {
    let (time, answers) = timed(join_all(twins.iter().map(|twin| twin.ours.run("GetStats")))).await;
    for answer in answers {
        answer.map_err(|e| format!("{e:?}"))?;
    }
    Ok(time)
}

/// A disk that nothing boots from.
fn blank(path: &Path) -> std::io::Result<()> {
    let made =
        std::process::Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(path).arg("1M").status()?;
    if made.success() { Ok(()) } else { Err(std::io::Error::other("qemu-img failed")) }
}
