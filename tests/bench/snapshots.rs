//! Snapshots of a running guest beside libvirt's: 256 MiB of memory, 1 GiB of disk, all inside the image.

use crate::bus::{Result, undefine};
use crate::common::client::options;
use crate::common::guest::Tick;
use crate::common::snapshots::Player;
use crate::libvirt::{Libvirt, Pair, timed};

const ROUNDS: usize = 8;
const SNAPSHOT: &str = "<domainsnapshot><name>bench</name></domainsnapshot>";

/// Create, revert and delete, in turns.
pub async fn compare(libvirt: &Libvirt<'_>) -> Result<()> {
    let (Some(ours), Some(theirs)) = (guest(libvirt, "snap-ours"), guest(libvirt, "snap-theirs")) else {
        return Ok(());
    };
    let player = Player { domain: libvirt.bench().define(&ours.xml).await };
    let path = libvirt.define(&theirs.xml).await?;
    player.domain.run("Start").await.map_err(|e| format!("{e:?}"))?;
    libvirt.domain(&path, "Create", &(0_u32,)).await?;
    ours.counts_to(3).await;
    theirs.counts_to(3).await;
    let [mut create, mut revert, mut delete] = [const { Pair::new() }; 3];
    for _ in 0..ROUNDS {
        create.0.push(timed(player.create(SNAPSHOT, options([]))).await.0);
        let (time, made) = timed(libvirt.domain(&path, "SnapshotCreateXML", &(SNAPSHOT, 0_u32))).await;
        let snapshot = made?.body().deserialize::<zbus::OwnedObjectPath>()?.to_string();
        create.1.push(time);
        ours.goes_on().await;
        revert.0.push(timed(player.call("bench", "Revert", options([]))).await.0);
        revert.1.push(on_snapshot(libvirt, &snapshot, "Revert").await?);
        ours.goes_on().await;
        delete.0.push(timed(player.call("bench", "Delete", options([]))).await.0);
        delete.1.push(on_snapshot(libvirt, &snapshot, "Delete").await?);
    }
    create.show("Snapshot of a running guest, 256 MiB: create");
    revert.show("the same: revert (virtd in place, libvirt a new process)");
    delete.show("the same: delete");
    player.domain.run("Destroy").await.map_err(|e| format!("{e:?}"))?;
    libvirt.domain(&path, "Destroy", &(0_u32,)).await?;
    libvirt.domain(&path, "Undefine", &(0_u32,)).await?;
    undefine(&player.domain).await;
    Ok(())
}

fn guest(libvirt: &Libvirt<'_>, name: &str) -> Option<Tick> {
    let mut tick = Tick::new(&libvirt.bench().daemon, name, "")?;
    let grown = std::process::Command::new("qemu-img").args(["resize", "-q"]).arg(&tick.disk).arg("1G").status();
    tick.xml = tick.xml.replace("<memory unit='MiB'>16", "<memory unit='MiB'>256");
    grown.is_ok_and(|status| status.success()).then_some(tick)
}

async fn on_snapshot(libvirt: &Libvirt<'_>, path: &str, method: &str) -> Result<std::time::Duration> {
    let (time, done) = timed(libvirt.call(path, "org.libvirt.DomainSnapshot", method, &(0_u32,))).await;
    done.map(|_| time)
}
