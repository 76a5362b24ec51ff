//! What QEMU makes of a CPU that its definition leaves to the host: asked once, when a guest starts, and kept with it.

use super::capabilities::plain_features;
use super::command::is_of_the_system;
use super::qmp::Qmp;
use serde_json::{Map, Value, json};
use virt_model::domain::DomainDef;
use virt_model::domain::cpu::{Cpu, CpuCheck, CpuFeature, CpuMatch, CpuMode, CpuModel, Fallback, FeaturePolicy};
use virt_model::domain::part::Part as _;
use virt_model::xml;

/// Whether the definition leaves it to the host and this QEMU what the CPU is.
pub fn is_open(def: &DomainDef) -> bool {
    def.cpu.as_ref().is_some_and(|cpu| cpu.mode.unwrap_or_default() != CpuMode::Custom)
}

/// The CPU of a QEMU with these arguments. `None` where it does not tell.
pub async fn ask(monitor: &Qmp, args: &[String], def: &DomainDef) -> Option<Cpu> {
    let (model, question) = question(args)?;
    let answer = monitor.execute("query-cpu-model-expansion", question).await;
    let answer = answer.inspect_err(|error| tracing::warn!(uuid = %def.uuid, %error, "QEMU does not tell its CPU"));
    made(model, &answer.ok()?, def)
}

/// As it is kept in a guest's record.
pub fn written(cpu: &Cpu) -> String {
    cpu.write("cpu").write()
}

/// From a guest's record.
pub fn read(text: &str) -> Option<Cpu> {
    let mut log = Vec::new();
    let cpu = Cpu::read(xml::read(text, &[]).ok()?, &mut log);
    log.is_empty().then_some(cpu)
}

/// What is asked of it: its model, and what is turned on or off in it.
fn question(args: &[String]) -> Option<(String, Value)> {
    let said = args.iter().zip(args.iter().skip(1)).find(|(option, _)| *option == "-cpu")?.1;
    let mut words = said.split(',');
    let model = words.next()?.to_owned();
    // What cannot be had is told at the start, and not once more.
    let switches = words.filter_map(|word| word.split_once('=')).filter(|(name, _)| *name != "enforce");
    let on_or_off = |value: &str| match value {
        "on" => Some(Value::Bool(true)),
        "off" => Some(Value::Bool(false)),
        _ => None,
    };
    let props: Map<String, Value> =
        switches.filter_map(|(name, value)| Some((name.to_owned(), on_or_off(value)?))).collect();
    let question = json!({ "type": "static", "model": { "name": model, "props": props } });
    Some((model, question))
}

/// The CPU of that model with the features that it was found to have, and no others.
fn made(model: String, answer: &Value, def: &DomainDef) -> Option<Cpu> {
    let mut names: Vec<String> = plain_features(answer)?
        .filter(|(name, has)| *has && !is_of_the_system(name))
        .map(|(name, _)| name.to_owned())
        .collect();
    names.sort();
    let feature = |name| CpuFeature { policy: Some(FeaturePolicy::Require), name, ..CpuFeature::default() };
    let vendor_id = def.cpu.as_ref().and_then(|cpu| cpu.model.as_ref()?.vendor_id.clone());
    Some(Cpu {
        mode: Some(CpuMode::Custom),
        matching: Some(CpuMatch::Exact),
        check: Some(CpuCheck::Full),
        model: Some(CpuModel { fallback: Some(Fallback::Forbid), vendor_id, name: Some(model), ..CpuModel::default() }),
        features: names.into_iter().map(feature).collect(),
        ..Cpu::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn def() -> DomainDef {
        let text = "<domain type='qemu'><name>d</name><memory>1</memory><cpu mode='host-model'/></domain>";
        DomainDef::parse(text).unwrap()
    }

    #[test]
    fn x11_what_is_asked_is_what_the_guest_was_started_with() {
        let args = ["-m", "64", "-cpu", "max,migratable=on,avx2=off,vendor=GenuineIntel,enforce=on"].map(str::to_owned);
        let (model, question) = question(&args).unwrap();
        assert_eq!(model, "max");
        assert_eq!(question["model"]["props"], json!({ "migratable": true, "avx2": false }));
    }

    #[test]
    fn x11_what_a_cpu_was_made_of_is_kept_by_name() {
        let props = json!({ "avx2": false, "sse4.1": true, "family": 15, "osxsave": true, "aes": true });
        let answer = json!({ "model": { "name": "base", "props": props } });
        let cpu = made("max".to_owned(), &answer, &def()).unwrap();
        let text = written(&cpu);
        let told = "<cpu mode='custom' match='exact' check='full'>\n  <model fallback='forbid'>max</model>\n  \
                    <feature policy='require' name='aes'/>\n  <feature policy='require' name='sse4.1'/>\n</cpu>";
        assert_eq!(text.trim(), told);
        assert_eq!(written(&read(&text).unwrap()), text);
    }
}
