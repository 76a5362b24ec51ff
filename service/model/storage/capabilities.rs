//! What a host can do with pools, as libvirt's document.

use super::pool::PoolSource;
use crate::domain::part::Part as _;
use crate::driver::storage::PoolAbility;
use crate::xml::Element;

/// `<storagepoolCapabilities>`
pub fn capabilities(abilities: &[PoolAbility]) -> String {
    let mut root = Element::new("storagepoolCapabilities");
    for ability in abilities {
        let supported = if ability.lacks.is_none() { "yes" } else { "no" };
        let mut pool = Element::new("pool").with_attr("type", ability.kind.as_str()).with_attr("supported", supported);
        if !ability.source_formats.is_empty() {
            let mut options = Element::new("poolOptions");
            options.push(choice("sourceFormatType", ability.source_formats));
            pool.push(options);
        }
        if let Some(usual) = ability.volume_formats.first() {
            let mut options = Element::new("volOptions");
            options.push(Element::new("defaultFormat").with_attr("type", *usual));
            options.push(choice("targetFormatType", ability.volume_formats));
            pool.push(options);
        }
        root.push(pool);
    }
    root.write()
}

/// `<sources>`: what pools could come from.
pub fn sources(found: &[PoolSource]) -> String {
    let mut root = Element::new("sources");
    found.iter().for_each(|source| root.push(source.write("source")));
    root.write()
}

fn choice(name: &str, values: &[&str]) -> Element {
    let mut choice = Element::new("enum").with_attr("name", name);
    values.iter().for_each(|value| choice.push(Element::new("value").with_text(*value)));
    choice
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::pool::PoolKind;

    #[test]
    fn each_type_says_what_it_can() {
        let can = PoolAbility {
            kind: PoolKind::Dir,
            lacks: None,
            volume_formats: &["raw", "qcow2"],
            source_formats: &[],
            features: &["create"],
            finds_sources: false,
        };
        let cannot = PoolAbility {
            kind: PoolKind::Fs,
            lacks: Some("no".to_owned()),
            volume_formats: &[],
            source_formats: &["ext4"],
            features: &[],
            finds_sources: false,
        };
        let text = capabilities(&[can, cannot]);
        for part in [
            "<pool type='dir' supported='yes'>",
            "<defaultFormat type='raw'/>",
            "<enum name='targetFormatType'>\n        <value>raw</value>\n        <value>qcow2</value>",
            "<pool type='fs' supported='no'>",
            "<enum name='sourceFormatType'>\n        <value>ext4</value>",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
