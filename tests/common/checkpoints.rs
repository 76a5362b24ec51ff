//! A domain's checkpoints, as a client sees them.

use super::client::{Domain, Options, Refusal, Watch, options};
use std::collections::HashMap;
use zbus::{Message, OwnedObjectPath, OwnedVariant};

const CHECKPOINT: &str = "org.virt.Checkpoint";

/// The path of a checkpoint whose name is letters and digits.
pub fn path(domain: &Domain, name: &str) -> String {
    format!("{}/checkpoint/{name}", domain.path)
}

/// Creates one of that name, of all disks; its path.
pub async fn create(domain: &Domain, name: &str) -> Result<String, Refusal> {
    create_as(domain, &format!("<domaincheckpoint><name>{name}</name></domaincheckpoint>")).await
}

/// Creates one by its document; its path.
pub async fn create_as(domain: &Domain, xml: &str) -> Result<String, Refusal> {
    let reply = domain.call("CreateCheckpoint", &(xml, options([]))).await?;
    Ok(reply.body().deserialize::<OwnedObjectPath>().expect("o").to_string())
}

/// Calls a method of one that takes options.
pub async fn call(domain: &Domain, name: &str, method: &str, options: Options<'_>) -> Result<Message, Refusal> {
    domain.client.call(&path(domain, name), &format!("{CHECKPOINT}.{method}"), &(options,)).await
}

/// A property of one.
pub async fn get<T>(domain: &Domain, name: &str, property: &str) -> T
where
    T: TryFrom<OwnedVariant>,
    T::Error: std::fmt::Debug,
{
    domain.client.property(&path(domain, name), CHECKPOINT, property).await
}

/// Their names, in order.
pub async fn list(domain: &Domain) -> Vec<String> {
    let listed = domain.run("ListCheckpoints").await.expect("listed");
    let paths: Vec<OwnedObjectPath> = listed.body().deserialize().expect("ao");
    paths.iter().map(|path| path.as_str().rsplit('/').next().unwrap_or_default().to_owned()).collect()
}

/// Waits until it is told that the checkpoint is broken; why.
pub async fn breaks(watch: &mut Watch, domain: &Domain, name: &str) -> String {
    loop {
        let message = watch.next().await;
        let header = message.header();
        if header.member().is_none_or(|member| member != "PropertiesChanged")
            || header.path().is_none_or(|of| of.as_str() != path(domain, name))
        {
            continue;
        }
        let body = message.body();
        let (_, values, _): (String, HashMap<String, OwnedVariant>, Vec<String>) =
            body.deserialize().expect("sa{sv}as");
        if let Some(broken) = values.get("Broken") {
            return String::try_from(broken.try_clone().expect("no descriptor")).expect("s");
        }
    }
}
