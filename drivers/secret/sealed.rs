//! One value as it lies in a file, and the tool that seals and opens it.

use crate::base64;
use crate::host::tool::{Bounds, Tool, ear, mouth, tame};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;
use virt_model::driver::DriverError;
use virt_model::driver::secrets::{KeptValue, LARGEST_SECRET, Protection, SecretValue};
use zeroize::Zeroizing;

/// The tool.
const TOOL: &str = "/usr/bin/systemd-creds";
/// How long it may take; a TPM may be slow.
const PATIENCE: Duration = Duration::from_secs(30);
/// The most that it says: a sealed value, in base64.
const LONGEST: u64 = 3 * LARGEST_SECRET as u64;

/// What is in a file.
#[derive(Serialize, Deserialize)]
pub struct Sealed {
    protection: String,
    changed_usec: u64,
    /// As the tool wrote it; of a value that is not sealed, in base64.
    #[serde(with = "text")]
    data: Zeroizing<String>,
}

/// A text that is zeroed when it is dropped, as JSON has it.
mod text {
    use serde::{Deserialize as _, Deserializer, Serializer};
    use zeroize::Zeroizing;

    pub fn serialize<S: Serializer>(text: &Zeroizing<String>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(text)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Zeroizing<String>, D::Error> {
        String::deserialize(from).map(Zeroizing::new)
    }
}

impl Sealed {
    /// What is known of it.
    pub fn about(&self) -> KeptValue {
        let known = Protection::ALL.into_iter().find(|known| known.as_str() == self.protection);
        KeptValue { protection: known.unwrap_or(Protection::File), changed_usec: self.changed_usec }
    }
}

/// How values can be sealed on this host.
pub async fn means() -> Protection {
    let name = Uuid::nil();
    for protection in [Protection::Tpm2, Protection::HostKey] {
        if protection == Protection::Tpm2 && !Path::new("/dev/tpmrm0").exists() {
            continue;
        }
        let tried = seal(protection, name, &SecretValue::from(b"test".to_vec()), 0).await;
        match tried {
            Ok(sealed) if unseal(name, &sealed).await.is_ok_and(|value| value.bytes() == b"test") => return protection,
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "values cannot be sealed by {}", protection.as_str()),
        }
    }
    tracing::info!("systemd-creds seals nothing here: secrets' values are kept in files that only virtd may read");
    Protection::File
}

/// A value as it is to be kept.
pub async fn seal(
    protection: Protection,
    uuid: Uuid,
    value: &SecretValue,
    changed_usec: u64,
) -> Result<Sealed, DriverError> {
    let keys: &[&str] = match protection {
        // To no PCR: the default is one that an update of the firmware changes, and nothing would open after it.
        Protection::Tpm2 => &["--with-key=host+tpm2", "--tpm2-pcrs="],
        Protection::HostKey => &["--with-key=host"],
        Protection::File | Protection::Memory => {
            let data = Zeroizing::new(base64::encode(value.bytes()));
            return Ok(Sealed { protection: Protection::File.as_str().to_owned(), changed_usec, data });
        }
    };
    let name = format!("--name={uuid}");
    let said = run(&[&["encrypt"], keys, &[&*name, "-", "-"]].concat(), value.bytes()).await?;
    let data = String::from_utf8(said.to_vec()).map_err(|_| failed("its answer is no text"))?;
    Ok(Sealed { protection: protection.as_str().to_owned(), changed_usec, data: Zeroizing::new(data) })
}

/// The value in a file.
pub async fn unseal(uuid: Uuid, sealed: &Sealed) -> Result<SecretValue, DriverError> {
    if sealed.protection == Protection::File.as_str() {
        let bytes = base64::decode(&sealed.data, LARGEST_SECRET).filter(|(_, all)| *all);
        let broken = || DriverError::Storage(format!("the value of secret {uuid} cannot be read: it is not in base64"));
        return bytes.map(|(bytes, _)| SecretValue::from(bytes)).ok_or_else(broken);
    }
    let opened = run(&["decrypt", &format!("--name={uuid}"), "-", "-"], sealed.data.as_bytes()).await;
    let broken =
        |error| DriverError::Storage(format!("the value of secret {uuid} cannot be opened: {error}; set it anew"));
    let opened = opened.map_err(broken)?;
    Ok(SecretValue::from(opened.to_vec()))
}

/// Runs the tool with `input`; what it says. It is given nothing else, and no secret as an argument.
async fn run(arguments: &[&str], input: &[u8]) -> Result<Zeroizing<Vec<u8>>, DriverError> {
    let start = || {
        let (mut to, its_input) = mouth()?;
        let (mut from, its_output) = ear()?;
        let mut command = Command::new(TOOL);
        command.args(arguments).env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C").current_dir("/");
        command.stdin(Stdio::from(its_input)).stdout(Stdio::from(its_output)).stderr(Stdio::null());
        tame(&mut command, None, Bounds { data: None, cpu: Some(60), files: Some(256) });
        let tool = Tool::start(command)?;
        Ok::<_, std::io::Error>(async move {
            let tells = async move {
                let told = to.write_all(input).await;
                drop(to);
                told
            };
            // Of its full size at once: a buffer that grows leaves copies behind.
            let mut said = Zeroizing::new(Vec::with_capacity(LONGEST as usize));
            let hears = async { (&mut from).take(LONGEST).read_to_end(&mut said).await };
            let (told, heard) = tokio::join!(tells, hears);
            (told.is_ok() && heard.is_ok() && tool.succeeds().await).then_some(said)
        })
    };
    let running = start().map_err(|e| failed(&e))?;
    match tokio::time::timeout(PATIENCE, running).await {
        Ok(Some(said)) => Ok(said),
        Ok(None) => Err(failed("it failed")),
        Err(_) => Err(failed("it does not answer")),
    }
}

fn failed(why: impl std::fmt::Display) -> DriverError {
    DriverError::Storage(format!("{TOOL}: {why}"))
}
