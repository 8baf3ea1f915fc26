//! A public API, read from rustdoc's JSON.

use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::HashSet;
use std::path::Path;

/// The format of rustdoc's JSON that this version of `public-api` reads.
const FORMAT: u64 = 57;

/// rustdoc writes another format of JSON.
#[derive(Debug)]
pub struct OtherFormat(u64);

impl std::fmt::Display for OtherFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "writes JSON of format {}, and xtask reads {FORMAT}", self.0)
    }
}

impl std::error::Error for OtherFormat {}

/// The public API of one crate.
pub struct Listing {
    /// A line for each item, sorted by path.
    pub lines: Vec<String>,
    /// Structs, enums, unions, traits and type aliases, each once however many paths lead to it.
    pub types: usize,
    /// Of the enums whose names end in `Error`, the one with the most variants, and their number.
    pub largest_error: Option<(String, usize)>,
}

impl Listing {
    /// Reads what rustdoc wrote.
    pub fn of(json: &Path) -> Result<Listing> {
        let text =
            std::fs::read_to_string(json).with_context(|| format!("cannot read {}", json.display()))?;
        let crate_: Value = serde_json::from_str(&text)?;
        let format = crate_["format_version"].as_u64().unwrap_or(0);
        if format != FORMAT {
            return Err(OtherFormat(format).into());
        }
        let index = &crate_["index"];
        let of_trait_impls = functions_of_trait_impls(index);
        let api = public_api::Builder::from_rustdoc_json(json).omit_blanket_impls(true).build()?;
        let mut listing = Listing { lines: Vec::new(), types: 0, largest_error: None };
        let (mut seen, mut known) = (HashSet::new(), HashSet::new());
        for item in api.items() {
            let id = item.id().0;
            let entry = &index[id.to_string()];
            let line = item.to_string();
            if of_trait_impls.contains(&u64::from(id)) || is_implied(&entry["inner"]) {
                continue;
            }
            if seen.insert(id) {
                listing.count(entry, &line);
            }
            if known.insert(line.clone()) {
                listing.lines.push(line);
            }
        }
        Ok(listing)
    }

    /// Counts an item that was not met before.
    fn count(&mut self, entry: &Value, line: &str) {
        let inner = &entry["inner"];
        let is = |kind: &&str| inner.get(kind).is_some();
        self.types += usize::from(["struct", "enum", "union", "trait", "type_alias"].iter().any(is));
        let name = entry["name"].as_str().unwrap_or_default();
        if let Some(variants) = inner["enum"]["variants"].as_array()
            && name.ends_with("Error")
            && self.largest_error.as_ref().is_none_or(|(_, most)| variants.len() > *most)
        {
            let path = line.rsplit(' ').next().unwrap_or(line);
            self.largest_error = Some((path.to_string(), variants.len()));
        }
    }
}

/// The functions that the implementation of a trait says already.
fn functions_of_trait_impls(index: &Value) -> HashSet<u64> {
    let items = index.as_object().into_iter().flat_map(|index| index.values());
    let impls = items.map(|item| &item["inner"]["impl"]).filter(|inner| !inner["trait"].is_null());
    let members = impls.flat_map(|inner| inner["items"].as_array().into_iter().flatten());
    let is_function = |id: &u64| index[id.to_string()]["inner"].get("function").is_some();
    members.filter_map(Value::as_u64).filter(is_function).collect()
}

/// Whether nobody needs to be told: blocks of methods, and traits that the compiler implements for nearly
/// everything. Their absence is told, since a type that stops being `Send` breaks its users.
fn is_implied(inner: &Value) -> bool {
    let Some(block) = inner.get("impl") else { return false };
    let path = block["trait"]["path"].as_str();
    match path.map(|path| path.rsplit(':').next().unwrap_or(path)) {
        None | Some("StructuralPartialEq") => true,
        Some(name) if block["is_synthetic"] == true => {
            block["is_negative"] == false || !["Send", "Sync"].contains(&name)
        }
        Some(_) => false,
    }
}
