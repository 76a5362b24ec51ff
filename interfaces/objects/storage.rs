//! `org.virt.Manager.Storage`: pools are defined, found and listed.

use super::job::{finish, no_wait};
use super::pool::{MANAGER, path, start_options};
use super::volume::path as volume_path;
use super::{Members, paths, properties, told};
use crate::bus::call::{self, Call, Options, Outcome};
use crate::bus::rows::{Facts, Objects};
use crate::bus::table::Offer;
use crate::bus::wire::{Row, Value};
use std::collections::HashMap;
use std::sync::Arc;
use virt_model::driver::storage::PoolAbility;
use virt_service::Service;
use virt_service::facts::ObjectFacts;
use virt_service::verb;
use zbus::{ObjectPath, Variant};

properties! {
    abilities: [PoolAbility] {
        "PoolTypes" = Tables(&abilities.iter().map(|ability| (ability.kind.as_str(), table(ability))).collect::<Vec<_>>());
    }
}

fn table(ability: &PoolAbility) -> Vec<(&'static str, Value<'_>)> {
    vec![
        ("supported", Value::Bool(ability.lacks.is_none())),
        ("reason", Value::Str(ability.lacks.as_deref().unwrap_or_default())),
        ("volume-formats", Value::Strs(ability.volume_formats)),
        ("source-formats", Value::Strs(ability.source_formats)),
        ("features", Value::Strs(ability.features)),
        ("find-sources", Value::Bool(ability.finds_sources)),
    ]
}

/// Its properties.
pub fn properties_of(abilities: &[PoolAbility]) -> Row {
    row(abilities)
}

/// What there is for each member.
pub fn offer(service: &Arc<Service>) -> Offer {
    Members::new(service, |service, _| Ok(service.clone()))
        .method(&verb::DEFINE_POOL, define)
        .method(&verb::CREATE_POOL, create)
        .method(&verb::GET_POOL, get)
        .method(&verb::GET_POOL_BY_NAME, get_by_name)
        .method(&verb::LIST_POOLS, list)
        .method(&verb::VALIDATE_POOL, validate)
        .method(&verb::POOL_CAPABILITIES, capabilities)
        .method(&verb::FIND_SOURCES, find_sources)
        .method(&verb::GET_VOLUME_BY_PATH, get_volume)
        .method(&verb::GET_VOLUME_BY_KEY, get_volume_by_key)
        .method(&verb::GET_QUOTA, get_quota)
        .offer(MANAGER, FIELDS, &[("StoragePoolLifecycle", "ossss")])
}

async fn define(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    options.end()?;
    call.reply(&path(&*service.define_pool(call.caller(), xml).await?)?)
}

async fn create(service: Arc<Service>, call: Call) -> Outcome {
    let (made, no_wait) = {
        let body = call.body();
        let (xml, mut options): (&str, Options) = call::read(&body)?;
        let start = start_options(&mut options)?;
        let no_wait = no_wait(options)?;
        (service.create_pool(call.caller(), xml, start).await?, no_wait)
    };
    let (pool, ticket) = made;
    call.reply(&(path(&pool)?, finish(ticket, no_wait).await?))
}

async fn get(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let uuid: &str = call::read(&body)?;
    call.reply(&path(&*service.pool_by_uuid(uuid)?)?)
}

async fn get_by_name(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let name: &str = call::read(&body)?;
    call.reply(&path(&*service.pool_by_name(name)?)?)
}

/// Path, name, uuid, state, whether it is stored.
type Entry = (ObjectPath<'static>, String, String, &'static str, bool);

async fn list(_: Arc<Service>, call: Call) -> Outcome {
    let mut options = call.options()?;
    let (active, persistent) = (options.flag_if_given("active")?, options.flag_if_given("persistent")?);
    options.end()?;
    call.listing(move |objects: &Objects| {
        let pools = objects.below("/org/virt/pool").filter_map(|object| match &object.facts {
            Facts::Other(ObjectFacts::Pool(facts)) => Some((object, facts)),
            _ => None,
        });
        let wanted = pools.filter(|(_, facts)| active.is_none_or(|active| facts.active == active));
        let wanted = wanted.filter(|(_, facts)| persistent.is_none_or(|persistent| facts.persistent == persistent));
        let entries = wanted.filter_map(|(object, facts)| {
            let path = paths::argument(object.path.to_string()).ok()?;
            Some((path, facts.name.clone(), facts.uuid.to_string(), facts.state, facts.persistent))
        });
        entries.collect::<Vec<Entry>>()
    })
}

async fn validate(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (xml, options): (&str, Options) = call::read(&body)?;
    options.end()?;
    let findings = service.validate_pool(call.caller(), xml).await?;
    call.reply(&findings.iter().map(told::finding).collect::<Vec<_>>())
}

async fn capabilities(service: Arc<Service>, call: Call) -> Outcome {
    call.reply(&virt_model::storage::capabilities(&service.pool_abilities()))
}

async fn find_sources(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let (kind, xml): (&str, &str) = call::read(&body)?;
    call.reply(&virt_model::storage::sources(&service.find_sources(call.caller(), kind, xml).await?))
}

async fn get_volume(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let place: &str = call::read(&body)?;
    call.reply(&volume_path(&service.volume_by_path(place)?)?)
}

async fn get_volume_by_key(service: Arc<Service>, call: Call) -> Outcome {
    let body = call.body();
    let key: &str = call::read(&body)?;
    call.reply(&volume_path(&service.volume_by_key(key)?)?)
}

/// No limit is the greatest number of its type.
async fn get_quota(service: Arc<Service>, call: Call) -> Outcome {
    let uid: u32 = call.read()?;
    let quota = service.quota(call.caller(), uid).await?;
    call.reply(&HashMap::from([
        ("volumes", Variant::from(quota.volumes)),
        ("volumes-limit", Variant::from(quota.volumes_limit.unwrap_or(u32::MAX))),
        ("bytes", Variant::from(quota.bytes)),
        ("bytes-limit", Variant::from(quota.bytes_limit.unwrap_or(u64::MAX))),
    ]))
}
