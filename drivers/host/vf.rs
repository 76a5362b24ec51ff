//! Virtual functions of network cards: what the card holds them to before they are handed over, by the host's own device of
//! that card. A guest cannot change it.

use super::net_tool::{output, run};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io;

/// What a card holds one of its functions to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// The hardware address.
    pub mac: String,
    /// The VLAN that all its packets are in; 0: none.
    pub vlan: u16,
}

/// A function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// The card's own network device.
    pub card: String,
    /// From 0.
    pub number: u32,
}

impl Function {
    /// What it is held to now. Blocks.
    pub fn terms(&self) -> io::Result<Terms> {
        let said = output("ip", &["-json", "link", "show", "dev", &self.card])?;
        let said: Value = serde_json::from_slice(&said)?;
        terms_in(&said, self.number).ok_or_else(|| {
            io::Error::other(format!("'{}' does not say what its function {} is held to", self.card, self.number))
        })
    }

    /// Holds it to something else. Blocks.
    pub fn hold(&self, terms: &Terms) -> io::Result<()> {
        let (number, vlan) = (self.number.to_string(), terms.vlan.to_string());
        run("ip", &["link", "set", "dev", &self.card, "vf", &number, "mac", &terms.mac])?;
        run("ip", &["link", "set", "dev", &self.card, "vf", &number, "vlan", &vlan])
    }
}

/// Reads what `ip -json link show` prints.
fn terms_in(said: &Value, number: u32) -> Option<Terms> {
    let mut functions = said[0]["vfinfo_list"].as_array()?.iter();
    let function = functions.find(|function| function["vf"] == number)?;
    let vlan = function["vlan_list"][0]["vlan"].as_u64().unwrap_or(0);
    // Older ones call it `mac`.
    let mac = function["address"].as_str().or(function["mac"].as_str())?;
    Some(Terms { mac: mac.to_owned(), vlan: u16::try_from(vlan).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_card_says_is_understood() {
        let said = r#"[{"ifindex":4,"ifname":"ens1f0","mtu":1500,"num_vf":2,"vfinfo_list":[
            {"vf":0,"link_type":"ether","address":"aa:00:00:00:00:01","vlan_list":[{"vlan":42}],"spoofchk":true},
            {"vf":1,"mac":"aa:00:00:00:00:02","spoofchk":false}]}]"#;
        let said: Value = serde_json::from_str(said).unwrap();
        assert_eq!(terms_in(&said, 0), Some(Terms { mac: "aa:00:00:00:00:01".into(), vlan: 42 }));
        assert_eq!(terms_in(&said, 1), Some(Terms { mac: "aa:00:00:00:00:02".into(), vlan: 0 }));
        assert_eq!(terms_in(&said, 2), None);
        assert_eq!(terms_in(&serde_json::json!([{"ifname": "lo"}]), 0), None);
    }

    #[test]
    fn a_card_that_is_not_there_is_named() {
        let why = Function { card: "nosuchcard0".into(), number: 0 }.terms().unwrap_err().to_string();
        assert!(why.contains("nosuchcard0"), "{why}");
    }
}
