//! What drivers share that stand above another node and show its bytes.
//!
//! No driver itself, and no state: a filter asks its child for the same request, and the child's node checks alignment and
//! emulates what its own driver lacks.

use block::{Edge, Facts, Support};
use buf::IoBuf;
use serde_json::{Map, Value};

/// The facts of a driver that passes requests on to `child` as they come.
pub fn facts(child: &Edge) -> Facts {
    let below = child.facts();
    Facts {
        // The child's node emulates what its driver lacks.
        fua: Support::Native,
        zero: Support::Native,
        zero_align: 1,
        discard: below.discard,
        discard_align: 1,
        // Each filter says by itself whether it passes on what these are about.
        compressed_unit: 0,
        complete: false,
        ..(*below).clone()
    }
}

/// The file name of a node that has none of its own: its options as JSON, in the order given, then its children.
pub fn describe(driver: &str, options: &[(&str, Value)], children: &[(&str, &Edge)]) -> String {
    let mut json = Map::new();
    json.insert("driver".to_owned(), driver.into());
    json.extend(options.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
    json.extend(children.iter().map(|(name, child)| ((*name).to_owned(), description(child))));
    format!("json:{}", Value::Object(json))
}

/// A child as its own description, or as a driver with a file name.
pub fn description(child: &Edge) -> Value {
    let node = child.node();
    let name = node.driver().filename();
    let json = name.strip_prefix("json:").and_then(|json| serde_json::from_str(json).ok());
    json.unwrap_or_else(|| {
        let driver = node.driver().name();
        // The name of a null device says no more than its driver does.
        if driver.starts_with("null-") {
            serde_json::json!({ "driver": driver })
        } else {
            serde_json::json!({ "driver": driver, "filename": name })
        }
    })
}

/// The length of a transfer, in bytes.
pub fn len_of(buf: &IoBuf) -> u64 {
    u64::try_from(buf.len()).unwrap_or(u64::MAX)
}
