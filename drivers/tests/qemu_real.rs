//! Every definition of the corpus that needs no KVM, given to the QEMU of this host: it must accept the command line,
//! stand before its first instruction, and take the monitor commands that go with it.

mod qemu;

use qemu::{cases, completed, message, place, text};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use virt_drivers::DriverConfig;
use virt_drivers::qemu::QemuDriver;
use virt_drivers::qemu::capabilities::{Capabilities, Prober, default_emulator};
use virt_drivers::qemu::check::checked_command;
use virt_drivers::qemu::companion::Gifts;
use virt_drivers::qemu::plan::Role;
use virt_drivers::qemu::plan::SecretContent;
use virt_model::driver::Driver;

/// What QEMU says when all is well.
const CHATTER: [&str; 7] = [
    "Formatting '/dev/fd/",
    "wrote 512/512 bytes",
    "512 bytes, 1 ops",
    "doesn't support requested feature",
    "char device redirected to",
    "has no peer",
    "Unable to connect character device charserial1",
];

/// Killed and reaped whatever the test does.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

async fn host_qemu() -> Option<Arc<Capabilities>> {
    let binary = default_emulator("x86_64");
    if !binary.exists() {
        eprintln!("SKIPPED: {} is not installed, no command line was tried", binary.display());
        return None;
    }
    Some(Arc::new(Prober::new(None, None)).probe(uuid::Uuid::nil(), &binary).await.unwrap().capabilities)
}

/// Everything that the case's document names below `@DIR@`.
fn make_files(case: &str, dir: &Path) {
    let xml = text(&format!("{case}.xml"));
    for piece in xml.split("@DIR@/").skip(1) {
        let name = piece.split(['\'', '<']).next().unwrap();
        let path = dir.join(name);
        match Path::new(name).extension().and_then(|e| e.to_str()) {
            Some("qcow2") => image(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]),
            Some("raw") => std::fs::write(&path, vec![0; 1 << 20]).unwrap(),
            Some("aml") => std::fs::write(&path, table()).unwrap(),
            Some("fd") => std::fs::write(&path, vec![0xff; 128 << 10]).unwrap(),
            None => std::fs::write(&path, kernel()).unwrap(),
            _ => {}
        }
    }
}

fn image(args: &[&str]) {
    assert!(Command::new("qemu-img").args(args).status().unwrap().success());
}

/// The head of a firmware's table, with nothing behind it.
fn table() -> Vec<u8> {
    let mut table = vec![0; 36];
    table[..4].copy_from_slice(b"TEST");
    table[4] = 36;
    table
}

/// As much of a Linux kernel as QEMU looks at before the first instruction.
fn kernel() -> Vec<u8> {
    let mut kernel = vec![0; 4096];
    kernel[0x1f1] = 1;
    kernel[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel[0x206..0x208].copy_from_slice(&0x0204u16.to_le_bytes());
    kernel[0x211] = 1;
    kernel[0x22c..0x230].copy_from_slice(&0x37ff_ffffu32.to_le_bytes());
    kernel
}

/// Starts it as the driver does: the listening monitor is file descriptor 3. Its companions come along, and go with it.
fn start(command: &virt_drivers::qemu::plan::Command, dir: &Path) -> (Vec<Running>, UnixStream) {
    let socket = dir.join("monitor.sock");
    let mut gifts: Gifts = vec![(3, UnixListener::bind(&socket).unwrap().into())];
    gifts.extend(command.scratch.iter().map(|fd| (*fd, tempfile::tempfile().unwrap().into())));
    for secret in &command.secrets {
        let content = match &secret.content {
            SecretContent::Said(text) => text.as_str(),
            SecretContent::Kept(_) => "c2VjcmV0",
        };
        gifts.push((secret.fd, virt_drivers::host::secret::handed(content.as_bytes()).unwrap()));
    }
    let mut running = Vec::new();
    for companion in command.companions.iter().filter(|companion| companion.is_wanted()) {
        let (own, qemus) = companion.prepare(None, Path::new("/"), uuid::Uuid::nil()).unwrap();
        gifts.extend(qemus);
        let mut child = run(&companion.program, &companion.args, &own, &dir.join("beside"));
        match &companion.role {
            Role::Beside(_) => running.push(child),
            step => {
                let words = || std::fs::read_to_string(dir.join("beside")).unwrap();
                assert!(child.0.wait().unwrap().success(), "{}: {}", companion.name, words());
                if let Role::Maker { work, made, .. } = step {
                    std::fs::rename(work, made).unwrap();
                }
            }
        }
    }
    running.insert(0, run(&command.program, &command.args, &gifts, &dir.join("stderr")));
    (running, UnixStream::connect(&socket).unwrap())
}

fn run(program: &Path, args: &[String], gifts: &Gifts, words: &Path) -> Running {
    let mut child = Command::new(program);
    let words = std::fs::File::create(words).unwrap();
    child.args(args).stdin(Stdio::null()).stdout(words.try_clone().unwrap()).stderr(words);
    // Out of the way of the places that they go to.
    let copy = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 300).unwrap();
    let gifts: Vec<(i32, OwnedFd)> = gifts.iter().map(|(place, fd)| (*place, copy(fd))).collect();
    // SAFETY: dup2 is async-signal-safe, and the copies live until after the spawn.
    unsafe {
        child.pre_exec(move || {
            gifts.iter().for_each(|(place, fd)| _ = libc::dup2(fd.as_raw_fd(), *place));
            Ok(())
        })
    };
    Running(child.spawn().unwrap())
}

struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn open(stream: UnixStream, words: &Path) -> Monitor {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut monitor = Monitor(BufReader::new(stream));
        let greeting = monitor.line(words);
        assert!(greeting.get("QMP").is_some(), "{greeting}");
        monitor.ask("qmp_capabilities", &json!({}), words);
        monitor
    }

    fn line(&mut self, words: &Path) -> Value {
        let mut line = String::new();
        let read = self.0.read_line(&mut line).unwrap_or(0);
        let said = || std::fs::read_to_string(words).unwrap_or_default();
        assert!(read > 0, "QEMU ended: {}", said());
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, verb: &str, arguments: &Value, words: &Path) -> Value {
        let question = format!("{}\n", json!({"execute": verb, "arguments": arguments}));
        self.0.get_mut().write_all(question.as_bytes()).unwrap();
        loop {
            let answer = self.line(words);
            assert!(answer.get("error").is_none(), "{verb} {arguments}: {answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }
}

/// What QEMU itself says that came of a case: question, the way into the answer, and what is there.
fn seen(case: &str) -> Vec<(&'static str, Value, &'static str, Value)> {
    let device = |name: &str, property: &str, value: Value| {
        ("qom-get", json!({"path": format!("/machine/peripheral/{name}"), "property": property}), "", value)
    };
    match case {
        "encrypted" => vec![
            ("query-spice", json!({}), "/tls-port", json!(15901)),
            device("redir0", "filter", json!("0x08:0x1234:0xBEEF:0x0256:1|0x03:-1:-1:-1:1|-1:-1:-1:-1:0")),
        ],
        "ports" => vec![
            ("qom-get", json!({"path": "/machine", "property": "graphics"}), "", json!(false)),
            device("parallel1", "index", json!(1)),
            device("serial2", "iobase", json!(0x402)),
            device("rng0", "rng", json!("/objects/objrng0")),
        ],
        "slots" => vec![
            device("net0", "acpi-index", json!(1)),
            device("net1", "acpi-index", json!(2)),
            device("virtio-disk1", "acpi-index", json!(7)),
            device("net0", "rombar", json!(0)),
            device("net2", "romfile", json!("")),
            device("virtio-disk0", "drive", json!("vda-filter0")),
            (
                "human-monitor-command",
                json!({"command-line": "qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend \"write -P 7 0 512\""}),
                "",
                json!(""),
            ),
            device("scsi0-0-0-0", "dpofua", json!(true)),
            device("pci.1", "mem-reserve", json!(8 << 20)),
        ],
        _ => Vec::new(),
    }
}

#[tokio::test]
async fn this_hosts_qemu_takes_every_command_line() {
    let Some(caps) = host_qemu().await else { return };
    let mut caps = Capabilities::clone(&caps);
    let mut tried = 0;
    for case in cases() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_str().unwrap();
        caps.site.state_dir = dir.path().join("state");
        (caps.site.tls_dir, caps.site.certificates) = (qemu::data().join("tls"), qemu::certificates());
        let def = completed(&case, folder, &caps);
        if def.kind != "qemu" {
            continue;
        }
        make_files(&case, dir.path());
        let command = checked_command(&def, &caps, &place(folder))
            .unwrap_or_else(|findings| panic!("{case}: {}", message(&findings)));
        if let Some(nvram) = &command.nvram {
            let (template, from) = nvram.template.as_ref().unwrap();
            std::fs::create_dir_all(nvram.path.parent().unwrap()).unwrap();
            let (from_to, path) = (["convert", "-f", from, "-O", &nvram.format], nvram.path.to_str().unwrap());
            image(&[&from_to[..], &[template.to_str().unwrap(), path]].concat());
        }
        eprintln!("{case}");
        let (mut running, stream) = start(&command, dir.path());
        let words = dir.path().join("stderr");
        let mut monitor = Monitor::open(stream, &words);
        for (verb, arguments) in &command.setup {
            monitor.ask(verb, arguments, &words);
        }
        assert_eq!(monitor.ask("query-status", &json!({}), &words)["status"], "prelaunch", "{case}");
        let uuid = monitor.ask("query-uuid", &json!({}), &words)["UUID"].clone();
        assert_eq!(uuid, def.uuid.to_string(), "{case}");
        for (verb, arguments, path, value) in seen(&case) {
            let answer = monitor.ask(verb, &arguments, &words);
            let found = answer.pointer(path).cloned().unwrap_or_default();
            assert_eq!(found, value, "{case}: {verb} {arguments}: {answer}");
        }
        monitor.ask("quit", &json!({}), &words);
        assert!(running[0].0.wait().unwrap().success(), "{case}");
        if case == "slots" {
            let image = std::fs::read(dir.path().join("old.raw")).unwrap();
            assert!(image.iter().all(|byte| *byte == 0), "what was written to a transient disk is gone");
        }
        let mut said = String::new();
        std::fs::File::open(&words).unwrap().read_to_string(&mut said).unwrap();
        let complaints: Vec<&str> =
            said.lines().filter(|line| !CHATTER.iter().any(|chatter| line.contains(chatter))).collect();
        assert!(complaints.is_empty(), "{case}: {complaints:?}");
        tried += 1;
    }
    assert!(tried > 5);
}

#[tokio::test]
async fn what_is_shown_is_what_would_run() {
    if host_qemu().await.is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let driver = QemuDriver::new(&DriverConfig::below(dir.path(), false));
    let mut def = qemu::parse(
        "<domain type='qemu'><name>shown</name><memory>65536</memory><os><type machine='q35'>hvm</type></os><devices>\
         <graphics type='vnc'><listen type='socket'/></graphics><graphics type='spice' autoport='yes'/>\
         </devices></domain>",
    );
    driver.complete(&mut def).await.unwrap();
    let words = driver.native(&def, "qemu-argv").await.unwrap().join(" ");
    let socket = format!("-vnc unix:/run/virt/guests/{}/qemu/vnc0.sock", def.uuid);
    assert!(words.contains(&socket), "{words}");
    assert!(words.contains("-spice") && !words.contains("port=-1"), "{words}");
}
