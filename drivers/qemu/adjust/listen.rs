//! Where a display listens: of VNC QEMU exchanges the address, as long as nothing else of it listens. Whoever is connected stays so.

use super::own_word;
use crate::qemu::instance::Body;
use serde_json::{Value, json};
use virt_model::device::Graphics;
use virt_model::device::display::{GraphicsKind, ListenKind};
use virt_model::domain::DomainDef;
use virt_model::domain::listening::LOCALHOST;
use virt_model::driver::DriverError;

/// Has QEMU listen where `def` says of the display of that number.
pub async fn adjust(body: &Body, before: &DomainDef, def: &DomainDef, index: usize) -> Result<(), DriverError> {
    let (now, was) = (address_of(def, index)?, address_of(before, index)?);
    let told = body.execute("display-update", now).await.map(drop).map_err(own_word);
    // By then it listens nowhere.
    if told.is_err()
        && let Err(error) = body.execute("display-update", was).await
    {
        tracing::error!(uuid = %body.uuid, %error, "a display listens nowhere any more");
    }
    told
}

/// What QEMU is told of that.
fn address_of(def: &DomainDef, index: usize) -> Result<Value, DriverError> {
    let graphics = def.devices.graphics.get(index);
    let graphics = graphics.ok_or_else(|| DriverError::Internal("a display is lost".to_owned()))?;
    let port = may_move(graphics).map_err(|why| DriverError::Unsupported(why.to_owned()))?;
    let host = graphics.listen_address().unwrap_or(LOCALHOST);
    let address = json!({ "type": "inet", "host": host, "port": port.to_string() });
    Ok(json!({ "type": "vnc", "addresses": [address] }))
}

/// The port of a display whose address can be another; else why it cannot.
fn may_move(graphics: &Graphics) -> Result<i32, &'static str> {
    if graphics.kind != GraphicsKind::Vnc {
        return Err("only VNC listens elsewhere while it runs; 'config' says where it listens when it starts next");
    }
    if graphics.listen_kind() != ListenKind::Address {
        return Err("it does not listen on an address, and cannot as long as it runs");
    }
    if graphics.websocket.is_some() {
        return Err(
            "it listens for WebSocket, too, which stays where it is; 'config' says where it listens when it starts next",
        );
    }
    graphics.port.filter(|port| *port > 0).ok_or("the port on which it listens is not known")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_vnc_alone_the_address_can_be_another() {
        let told = |graphics: &str| {
            let text =
                format!("<domain type='qemu'><name>d</name><memory>1</memory><devices>{graphics}</devices></domain>");
            address_of(&DomainDef::parse(&text).expect("a machine"), 0).map_err(|error| error.to_string())
        };
        let vnc =
            told("<graphics type='vnc' port='5907' listen='::1'><listen type='address' address='::1'/></graphics>");
        let address = json!([{ "type": "inet", "host": "::1", "port": "5907" }]);
        assert_eq!(vnc.expect("told")["addresses"], address);
        for (graphics, why) in [
            ("<graphics type='spice' port='5907'/>", "only VNC"),
            ("<graphics type='vnc'><listen type='none'/></graphics>", "not listen on an address"),
            ("<graphics type='vnc' port='5907' websocket='5700'/>", "WebSocket"),
            ("<graphics type='vnc' port='-1'/>", "not known"),
        ] {
            assert!(told(graphics).expect_err(graphics).contains(why), "{graphics}");
        }
    }
}
