//! The features of the libraries: each alone, none, and all together compile without a warning.

use crate::{process, project};
use anyhow::Result;
use serde_json::Value;

/// Checks each choice of features of each package that has some.
///
/// Clippy, because its `-D warnings` leaves what is built already as it is, and a flag for rustc does not.
pub fn check() -> Result<()> {
    let metadata =
        process::output(project::cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    for (package, target, features) in with_features(&serde_json::from_str(&metadata)?) {
        for choice in choices(&features) {
            let mut clippy = project::cargo();
            clippy.args(["clippy", "--quiet", target, "--package", &package, "--no-default-features"]);
            clippy.args(["--features", &choice, "--", "-D", "warnings"]);
            super::shown(&mut clippy)?;
        }
    }
    Ok(())
}

/// The packages that have features, with the option for what they build, and the names of the features.
fn with_features(metadata: &Value) -> Vec<(String, &'static str, Vec<String>)> {
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let named = packages.filter_map(|package| {
        let features = package["features"].as_object()?.keys().filter(|name| *name != "default");
        let targets = package["targets"].as_array().into_iter().flatten();
        let is_program =
            targets.clone().count() > 0 && targets.clone().all(|target| target["kind"][0] != "lib");
        let target = if is_program { "--bins" } else { "--lib" };
        Some((package["name"].as_str()?.to_string(), target, features.cloned().collect::<Vec<_>>()))
    });
    named.filter(|(_, _, features)| !features.is_empty()).collect()
}

/// What `--features` takes: nothing, each feature, and all of them.
fn choices(features: &[String]) -> Vec<String> {
    let mut choices = vec![String::new()];
    choices.extend(features.iter().cloned());
    if features.len() > 1 {
        choices.push(features.join(","));
    }
    choices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_is_chosen() {
        let metadata = serde_json::json!({ "packages": [
            { "name": "plain", "features": {} },
            { "name": "one", "features": { "a": [] } },
            { "name": "two", "features": { "default": ["b"], "b": [], "c": ["dep:c"] },
              "targets": [{ "kind": ["lib"] }, { "kind": ["example"] }] },
            { "name": "program", "features": { "d": [] }, "targets": [{ "kind": ["bin"] }] },
        ]});
        let all = with_features(&metadata);
        let targets: Vec<_> = all.iter().map(|(name, target, _)| (name.as_str(), *target)).collect();
        assert_eq!(targets, [("one", "--lib"), ("two", "--lib"), ("program", "--bins")]);
        assert_eq!(choices(&all[0].2), ["", "a"]);
        assert_eq!(choices(&all[1].2), ["", "b", "c", "b,c"]);
    }
}
