//! The questions: a QEMU without a machine is started, asked over QMP on its standard streams, and ended. Each time it is
//! the file that was judged, whatever its name means by then.

use super::{Blockers, Capabilities, Machine};
use crate::host::files::Program;
use crate::host::tool::{Bounds, Rights, Tool, ear, mouth, tame};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::time::timeout;
use virt_model::driver::DriverError;

/// A binary that has not answered everything by then is given up. (About 0.2 s on an idle host.)
const PATIENCE: Duration = Duration::from_secs(20);

/// Of what a failing binary prints, this much is read.
const LAST_WORDS: u64 = 4096;

/// What one that is asked may take of the host.
const BOUNDS: Bounds = Bounds { data: None, cpu: Some(60), files: Some(1024) };

/// Asks everything but whether KVM works here.
pub async fn ask(program: &Program, binary: &Path, user: Option<(u32, u32)>) -> Result<Capabilities, DriverError> {
    let mut session = Session::open(program, "none", user)?;
    let answers = timeout(PATIENCE, questions(&mut session, binary)).await;
    let mut capabilities = session.close(binary, answers).await?;
    capabilities.audio = audio_backends(program, user).await;
    Ok(capabilities)
}

/// What this host's KVM can give to guests.
pub struct WithKvm {
    /// As in [`Capabilities::kvm_blockers`].
    pub blockers: Blockers,
    /// As in [`Capabilities::kvm_hyperv`].
    pub hyperv: Option<BTreeSet<String>>,
}

/// Whether QEMU itself gets KVM going, and what it gives then; else its reason. Only called where the host's half is fine.
pub async fn with_kvm(program: &Program, arch: &str, user: Option<(u32, u32)>) -> Result<WithKvm, String> {
    let mut session = Session::open(program, "none,accel=kvm", user).map_err(|e| e.to_string())?;
    let answer = timeout(PATIENCE, async {
        session.greeting().await?;
        let kvm = session.ask("query-kvm", Value::Null).await?;
        if !matches!((kvm["present"].as_bool(), kvm["enabled"].as_bool()), (Some(true), Some(true))) {
            return Err("it reports that KVM is not enabled".to_owned());
        }
        let cpus = session.ask("query-cpu-definitions", Value::Null).await.unwrap_or_default();
        Ok(WithKvm { blockers: blockers(&cpus), hyperv: session.hyperv(arch).await })
    });
    let answer = answer.await;
    session.close(program.path(), answer).await.map_err(|e| format!("QEMU cannot use KVM: {e}"))
}

async fn questions(session: &mut Session, binary: &Path) -> Result<Capabilities, String> {
    let greeting = session.greeting().await?;
    let version = &greeting["QMP"]["version"];
    let number = |part: &str| version["qemu"][part].as_u64().unwrap_or(0) as u32;
    let mut caps = Capabilities::absent(binary, String::new());
    caps.absent = None;
    caps.version = (number("major"), number("minor"), number("micro"));
    caps.package = text(&version["package"]);
    caps.arch = text(&session.ask("query-target", Value::Null).await?["arch"]);
    caps.machines = machines(&session.ask("query-machines", Value::Null).await?);
    caps.devices = names(&session.types("device").await?);
    caps.objects = names(&session.types("user-creatable").await?);
    caps.chardevs = names(&session.types("chardev").await?).iter().map(|n| n.replacen("chardev-", "", 1)).collect();
    caps.commands = names(&session.ask("query-commands", Value::Null).await?);
    let models = session.ask("query-cpu-definitions", Value::Null).await.unwrap_or_default();
    caps.cpus = cpus(&models);
    caps.emulated_blockers = blockers(&models);
    let deprecated = items(&models).filter(|model| model["deprecated"].as_bool() == Some(true));
    caps.deprecated_cpus = deprecated.map(|model| text(&model["name"])).collect();
    caps.cpu_features = session.features(&caps.arch).await;
    let largest = json!({"type": "static", "model": {"name": "max"}});
    // Not every architecture has an answer.
    let largest = session.ask("query-cpu-model-expansion", largest).await.unwrap_or_default();
    caps.plain_cpu_features = plain_features(&largest).into_iter().flatten().map(|(name, _)| name.to_owned()).collect();
    // After the lists of types: those load the modules that add option groups.
    let options = session.ask("query-command-line-options", Value::Null).await?;
    caps.options = items(&options).map(|o| text(&o["option"])).collect();
    caps.spice = caps.options.contains("spice") && caps.chardevs.contains("spicevmc");
    caps.sandbox = caps.options.contains("sandbox");
    let kvm = session.ask("query-kvm", Value::Null).await?;
    caps.kvm_built_in = kvm["present"].as_bool().unwrap_or(false);
    Ok(caps)
}

fn machines(answer: &Value) -> Vec<Machine> {
    let mut machines: Vec<Machine> = items(answer)
        .map(|m| Machine {
            name: text(&m["name"]),
            alias: m["alias"].as_str().map(str::to_owned),
            max_cpus: m["cpu-max"].as_u64().and_then(|n| n.try_into().ok()).unwrap_or(1),
            is_default: m["is-default"].as_bool().unwrap_or(false),
            deprecated: m["deprecated"].as_bool().unwrap_or(false),
        })
        .filter(|m| m.name != "none")
        .collect();
    machines.sort_by(|a, b| a.name.cmp(&b.name));
    machines
}

fn cpus(answer: &Value) -> Vec<String> {
    let mut names: Vec<String> = items(answer).map(|c| text(&c["name"])).collect();
    names.sort();
    names
}

/// What each CPU model has and cannot have here, of those of which that is known.
fn blockers(answer: &Value) -> Blockers {
    let lacks = |model: &Value| items(&model["unavailable-features"]).map(text).collect::<BTreeSet<_>>();
    let blocked = items(answer).map(|model| (text(&model["name"]), lacks(model)));
    blocked.filter(|(_, lacks)| !lacks.is_empty()).collect()
}

/// What QEMU's answer about a model says of its features, each by one name: whether the guest has it. What is no feature of
/// the CPU is not among them.
pub fn plain_features(answer: &Value) -> Option<impl Iterator<Item = (&str, bool)>> {
    let props = answer["model"]["props"].as_object()?;
    Some(props.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_bool()?))))
}

fn names(answer: &Value) -> BTreeSet<String> {
    items(answer).map(|item| text(&item["name"])).collect()
}

fn items(answer: &Value) -> impl Iterator<Item = &Value> {
    answer.as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// QMP has no question for audio backends in the versions we meet; `-audiodev help` lists them, one a line.
async fn audio_backends(program: &Program, user: Option<(u32, u32)>) -> BTreeSet<String> {
    let mut command = command(program, user);
    command.args(["-audiodev", "help"]).stdin(Stdio::null()).stderr(Stdio::null());
    let said = async {
        let (mut output, theirs) = ear()?;
        command.stdout(theirs);
        let (tool, mut said) = (Tool::start(command)?, Vec::new());
        output.read_to_end(&mut said).await?;
        Ok::<_, std::io::Error>((tool.succeeds().await, said))
    };
    match timeout(PATIENCE, said).await {
        Ok(Ok((true, said))) => {
            let listing = String::from_utf8_lossy(&said).into_owned();
            listing.lines().skip(1).map(|line| line.trim().to_owned()).filter(|name| !name.is_empty()).collect()
        }
        _ => BTreeSet::new(),
    }
}

/// A command with nothing inherited, nothing to be gained, whose process dies with us.
fn command(program: &Program, user: Option<(u32, u32)>) -> Command {
    let mut command = program.command();
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C");
    tame(&mut command, user.map(|(uid, gid)| Rights::of_group(uid, gid)), BOUNDS);
    command
}

/// A QEMU that is being asked.
struct Session {
    tool: Tool,
    input: Sender,
    output: Lines<BufReader<Receiver>>,
    errors: Receiver,
}

impl Session {
    fn open(program: &Program, machine: &str, user: Option<(u32, u32)>) -> Result<Self, DriverError> {
        let failed =
            |why: String| DriverError::Hypervisor(format!("{} cannot be run: {why}", program.path().display()));
        let mut command = command(program, user);
        command.args(["-machine", machine, "-nodefaults", "-no-user-config", "-S", "-display", "none"]);
        command.args(["-monitor", "none", "-qmp", "stdio"]);
        let begin = || {
            let ((input, stdin), (output, stdout), (errors, stderr)) = (mouth()?, ear()?, ear()?);
            command.stdin(stdin).stdout(stdout).stderr(stderr);
            let tool = Tool::start(command)?;
            Ok::<_, std::io::Error>(Session { tool, input, output: BufReader::new(output).lines(), errors })
        };
        begin().map_err(|e| failed(e.to_string()))
    }

    async fn greeting(&mut self) -> Result<Value, String> {
        let greeting = self.line().await?;
        if greeting["QMP"].is_null() {
            return Err("it does not speak QMP".to_owned());
        }
        self.ask("qmp_capabilities", Value::Null).await?;
        Ok(greeting)
    }

    async fn types(&mut self, implements: &str) -> Result<Value, String> {
        self.ask("qom-list-types", json!({"implements": implements, "abstract": false})).await
    }

    /// What a CPU has that is on or off. None where the binary has no CPU that says so.
    async fn features(&mut self, arch: &str) -> BTreeSet<String> {
        let answer = self.ask("qom-list-properties", json!({"typename": format!("max-{arch}-cpu")})).await;
        let on_or_off = |property: &&Value| property["type"] == "bool";
        answer.map(|list| items(&list).filter(on_or_off).map(|p| text(&p["name"])).collect()).unwrap_or_default()
    }

    /// What can be told to a guest of Hyper-V. `None` where the binary does not say.
    async fn hyperv(&mut self, arch: &str) -> Option<BTreeSet<String>> {
        if !matches!(arch, "x86_64" | "i386") {
            return None;
        }
        let all = json!({"type": "full", "model": {"name": "host", "props": {"hv-passthrough": true}}});
        let told = self.ask("query-cpu-model-expansion", all).await.ok()?;
        let told = told["model"]["props"].as_object()?;
        let known = told.iter().filter(|(name, value)| name.starts_with("hv-") && value.as_bool() == Some(true));
        Some(known.map(|(name, _)| name.clone()).filter(|name| name != "hv-passthrough").collect())
    }

    async fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let mut question = json!({ "execute": command });
        if !arguments.is_null() {
            question["arguments"] = arguments;
        }
        let question = format!("{question}\n");
        self.input.write_all(question.as_bytes()).await.map_err(|e| format!("{command}: {e}"))?;
        loop {
            let mut answer = self.line().await?;
            if let Some(description) = answer["error"]["desc"].as_str() {
                return Err(format!("{command}: {description}"));
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }

    async fn line(&mut self) -> Result<Value, String> {
        let line = self.output.next_line().await.map_err(|e| e.to_string())?;
        let line = line.ok_or("it ended without an answer")?;
        serde_json::from_str(&line).map_err(|_| "it does not speak QMP".to_owned())
    }

    /// Ends and reaps the process whatever came of it; a failure gets the process's last words.
    async fn close<T>(
        self,
        binary: &Path,
        answer: Result<Result<T, String>, tokio::time::error::Elapsed>,
    ) -> Result<T, DriverError> {
        // It may be one that outlives a closed stream; nothing of value is lost by force.
        let Session { tool, errors, .. } = self;
        drop(tool);
        match answer {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(why)) => Err(DriverError::Hypervisor(last_words(errors, binary, &why).await)),
            Err(_) => Err(DriverError::TimedOut(format!("{} did not answer within {PATIENCE:?}", binary.display()))),
        }
    }
}

/// Why a program cannot be used, with what it has said of it last.
async fn last_words(errors: Receiver, binary: &Path, why: &str) -> String {
    let mut words = Vec::new();
    let read = async { errors.take(LAST_WORDS).read_to_end(&mut words).await };
    // A grandchild may hold the stream open; then what has come so far has to do.
    if timeout(Duration::from_secs(1), read).await.is_err() {
        tracing::debug!(binary = %binary.display(), "its error stream stays open");
    }
    let words = String::from_utf8_lossy(&words);
    let words = words.trim().lines().last().unwrap_or_default();
    let colon = if words.is_empty() { "" } else { ": " };
    format!("{} cannot be used: {why}{colon}{words}", binary.display())
}
