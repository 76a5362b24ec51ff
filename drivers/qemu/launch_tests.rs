//! Starts whose block nodes no argument describes.

use super::*;
use crate::DriverConfig;
use crate::host::process::Identity;
use crate::qemu::plan::BEFORE_DEVICES;
use crate::qemu::{Beginning, QemuDriver};
use std::io;
use virt_model::driver::{Driver, Launch};

#[derive(Default)]
struct Disk(Mutex<Value>);

impl Recorder for Disk {
    fn record(&self, data: Value) -> io::Result<()> {
        *self.0.lock().unwrap() = data;
        Ok(())
    }
}

/// As with `<source query='…'>`: everybody on the host can read the arguments of everybody's processes.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_no_argument_describes_is_there_when_its_device_is_made() {
    if !Path::new("/usr/bin/qemu-system-x86_64").exists() {
        return eprintln!("SKIPPED: needs QEMU");
    }
    let dir = tempfile::tempdir().unwrap();
    let (uuid, disk, runtime_dir) = (Uuid::new_v4(), dir.path().join("token-4711"), dir.path().join("run"));
    std::fs::write(&disk, vec![0; 1 << 16]).unwrap();
    std::fs::create_dir(&runtime_dir).unwrap();
    let xml = format!(
        "<domain type='qemu'><name>m</name><uuid>{uuid}</uuid><memory unit='MiB'>16</memory>
         <os><type arch='x86_64' machine='q35'>hvm</type></os><devices><disk type='file'><driver type='raw'/>
         <source file='{}'/><target dev='sda' bus='sata'/></disk></devices></domain>",
        disk.display()
    );
    let driver = QemuDriver::new(&DriverConfig::below(dir.path(), false));
    let mut def = DomainDef::parse(&xml).unwrap();
    driver.complete(&mut def).await.unwrap();
    let (events, _reports) = virt_model::driver::reports();
    let (record, cancel) = (Arc::<Disk>::default(), CancellationToken::new());
    let launch = Launch {
        accepted: Default::default(),
        paused: true,
        reset_nvram: false,
        from: None,
        log_file: dir.path().join("log"),
        def: Arc::new(def),
        runtime_dir,
        recorder: record.clone(),
        events,
        cancel: cancel.clone(),
    };
    let Beginning { mut start, ground, live, ports: _ports } = driver.starting(launch, cancel).await.unwrap();
    let mut args = std::mem::take(&mut start.command.args).into_iter();
    while let Some(word) = args.next() {
        match &*word {
            "-blockdev" => start.command.nodes.push(serde_json::from_str(&args.next().unwrap()).unwrap()),
            _ => start.command.args.push(word),
        }
    }
    assert_eq!(start.command.nodes.len(), 2);
    start.command.args.push(BEFORE_DEVICES.to_owned());
    let up = start.run(ground, live).await.unwrap();
    let process: Identity = serde_json::from_value(record.0.lock().unwrap()["process"].clone()).unwrap();
    let arguments = String::from_utf8(std::fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap()).unwrap();
    assert!(arguments.contains(BEFORE_DEVICES) && !arguments.contains("token"), "{arguments}");
    let there = up.instance.body().monitor().unwrap().execute("query-block", json!({})).await.unwrap();
    assert!(there.to_string().contains("token-4711"), "{there}");
    up.instance.body().destroy(false).await.unwrap();
}
