//! A folder that another host shares by NFS, as a pool: the kernel's own server and client of it, in the guest of `taken.rs`.

use crate::unwatched::{Unwatched, new_volume};
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use virt_drivers::host::lender::Lender;
use virt_drivers::storage::HostStorage;
use virt_model::driver::DriverError;
use virt_model::driver::storage::{Content, KnownFormats, OpenPool, PoolChange, Storage as _};
use virt_model::storage::pool::PoolDef;

/// Has the kernel serve /srv, which is all that the server has, to this very host: what its tools would tell it is told here.
const SERVE: &str = "
ip link set lo up
mkdir -p /srv /var/lib/nfs/v4recovery
mount -t tmpfs srv /srv
mount -t nfsd nfsd /proc/fs/nfsd
echo 10 > /proc/fs/nfsd/nfsv4gracetime
echo -2 -3 +4 +4.1 +4.2 > /proc/fs/nfsd/versions
never=4000000000
echo nfsd 127.0.0.1 $never us > /proc/net/rpc/auth.unix.ip/channel
echo us /srv $never 9218 65534 65534 0 > /proc/net/rpc/nfsd.export/channel
printf 'us 1 \\\\x00000000 %s /srv\\n' $never > /proc/net/rpc/nfsd.fh/channel
echo tcp 2049 > /proc/fs/nfsd/portlist
echo 2 > /proc/fs/nfsd/threads";
/// It serves nobody any more, and its port is free.
const SERVE_NO_MORE: &str = "echo 0 > /proc/fs/nfsd/threads";

const POOL: &str = "<pool type='netfs'><name>nas</name><source><host name='127.0.0.1'/><dir path='/'/><format type='nfs'/>\
                    <protocol ver='4.2'/></source><target><path>/pools/nas</path></target></pool>";

fn storage() -> HostStorage {
    HostStorage::new(Arc::new(|| Ok(Lender::Ours)), Arc::new(|_| Ok(Vec::new())), Path::new("/run/virt"), true)
}

fn sh(script: &str) {
    assert!(Command::new("sh").args(["-ec", script]).status().expect("a shell").success(), "{script}");
}

/// What is mounted on the pool's folder, as the kernel has it.
fn mounted() -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("the table");
    table.lines().filter(|line| line.contains(" /pools/nas ")).map(str::to_owned).collect()
}

pub async fn a_folder_of_another_host_is_a_pool() {
    sh(SERVE);
    let (def, storage_of_one) = (PoolDef::parse(POOL).expect("a pool"), storage());
    let missing =
        storage_of_one.open(&def, &Unwatched::default()).await.map(|_| ()).expect_err("its folder is not there");
    assert!(missing.to_string().contains("build the pool first"), "{missing}");
    storage_of_one.build(&def, false, &Unwatched::default()).await.expect("its folder is made");
    let (old, new) = (Path::new("/srv/.virt-new-old"), Path::new("/srv/.virt-new-new"));
    for draft in [old, new] {
        fs::write(draft, "").expect("written");
    }
    let days_ago = SystemTime::now() - Duration::from_secs(2 * 86_400);
    fs::File::options().write(true).open(old).expect("a file").set_modified(days_ago).expect("set");
    let pool = storage_of_one.open(&def, &Unwatched::default()).await.expect("mounted");
    let lines = mounted();
    assert!(lines.len() == 1 && lines[0].contains("nosuid,nodev,noexec"), "{lines:?}");
    assert!(lines[0].contains(" - nfs4 127.0.0.1:/ ") && lines[0].contains("vers=4.2"), "{lines:?}");
    assert!(!pool.features().contains(&"watch"), "{:?}", pool.features());
    assert!(!old.exists() && new.exists(), "what another host is making stays");
    assert_eq!(fs::read_dir("/run/virt/shares").expect("a folder").count(), 0);
    a_volume_is_made(&*pool).await;
    the_next_virtd_finds_it(pool).await;
    somebody_unmounts_it(&def).await;
    sh(SERVE_NO_MORE);
    a_server_that_does_not_answer_is_waited_for_until_nobody_wants_to(&def).await;
}

async fn a_volume_is_made(pool: &dyn OpenPool) {
    let wanted = || new_volume("a.img", 1 << 20, Content::Empty);
    let look = pool.create(wanted(), Arc::new(Unwatched::default())).await.expect("made");
    assert_eq!((&*look.name, look.capacity), ("a.img", 1 << 20));
    let names = fs::read_dir("/srv").expect("a folder").map(|entry| entry.expect("a name").file_name());
    // What is closed a moment later has another name until then.
    let mut there: Vec<_> = names.filter(|name| !name.to_string_lossy().starts_with(".nfs")).collect();
    there.sort();
    assert_eq!(there, [".virt-new-new", "a.img"]);
    let taken = pool.create(wanted(), Arc::new(Unwatched::default())).await.expect_err("there is one");
    assert!(matches!(taken, DriverError::Exists(_)), "{taken}");
    let survey = pool.survey(&KnownFormats::default()).await.expect("read");
    assert_eq!(survey.volumes.len(), 1);
    assert!(survey.room.capacity > 0);
}

async fn the_next_virtd_finds_it(pool: Arc<dyn OpenPool>) {
    drop(pool);
    let (def, lines) = (PoolDef::parse(POOL).expect("a pool"), mounted());
    let next = storage();
    let pool = next.open(&def, &Unwatched::default()).await.expect("found");
    pool.take_back().await.expect("it was there before");
    assert_eq!(mounted(), lines);
    pool.close().await.expect("unmounted");
    assert!(mounted().is_empty());
    next.close(&def).await.expect("there is nothing");
}

async fn somebody_unmounts_it(def: &PoolDef) {
    let pool = storage().open(def, &Unwatched::default()).await.expect("mounted");
    let mut changes = pool.follow().await.expect("followed").expect("what this host changes is told");
    // The pool has it open.
    sh("umount -l /pools/nas");
    while changes.recv().await.expect("that is told") != PoolChange::Lost {}
    pool.close().await.expect("it is not there any more");
}

async fn a_server_that_does_not_answer_is_waited_for_until_nobody_wants_to(def: &PoolDef) {
    let refused = storage().open(def, &Unwatched::default()).await.map(|_| ()).expect_err("nobody listens");
    assert!(refused.to_string().contains("cannot mount 127.0.0.1:/: mount.nfs: "), "{refused}");
    let silent = TcpListener::bind("127.0.0.1:2049").expect("the port is free");
    let work = Unwatched::default();
    let cancel = work.0.clone();
    let waits = std::thread::spawn(move || {
        let client = silent.accept().expect("the tool comes");
        cancel.cancel();
        (client, silent)
    });
    let cancelled = storage().open(def, &work).await.map(|_| ()).expect_err("it is waited for in vain");
    assert!(matches!(cancelled, DriverError::Cancelled), "{cancelled}");
    drop(waits.join());
    assert!(mounted().is_empty());
}
