//! The order of the library's modules: no module mentions one above itself.
//!
//! `docs/architecture.md` states the order under "Layers". A mention is a path from the crate's root, in an
//! import or anywhere else in code. Documentation, tests and `lib.rs` may mention every module.

use proc_macro2::{Delimiter, Spacing, TokenStream, TokenTree};
use std::collections::HashMap;

/// The modules from bottom to top, as the block ` ```text layers ` of a page has them.
fn order(page: &str) -> Vec<String> {
    let block = page.lines().skip_while(|line| line.trim() != "```text layers").skip(1);
    let block = block.take_while(|line| line.trim() != "```");
    let names = block.flat_map(|line| line.split('<')).map(|name| name.trim().to_string());
    names.filter(|name| !name.is_empty()).collect()
}

/// What the code of one file may not mention, each as `line: reason`.
///
/// `path` is relative to `src`. `exports` has the names that `lib.rs` re-exports, with their modules or crates.
fn violations(
    path: &str,
    code: &str,
    order: &[String],
    exports: &HashMap<String, String>,
) -> Result<Vec<String>, String> {
    let stem = path.trim_end_matches(".rs").trim_end_matches("/mod");
    let module = stem.split('/').next().unwrap_or(stem);
    let Some(own) = order.iter().position(|name| name == module) else {
        return Ok(vec![format!("the module {module} has no layer")]);
    };
    let code: TokenStream = code.parse().map_err(|error| format!("{path}: {error}"))?;
    let mut found = Vec::new();
    mentions(&trees(code), stem.split('/').count(), &mut found);
    let found = found.into_iter().filter_map(|(line, name)| {
        let module = exports.get(&name).unwrap_or(&name);
        match order.iter().position(|name| name == module) {
            Some(layer) if layer <= own => None,
            Some(_) if *module == name => Some(format!("{line}: {module} is above")),
            Some(_) => Some(format!("{line}: {name} is of {module}, which is above")),
            // From another crate, all of which are below.
            None if exports.contains_key(&name) => None,
            None => Some(format!("{line}: {name} is neither a layer nor a re-export")),
        }
    });
    Ok(found.collect())
}

/// Line and name of everything directly under the crate's root that code mentions.
///
/// `depth` counts the modules from the root: 1 in `mr/mod.rs`.
fn mentions(tokens: &[TokenTree], depth: usize, found: &mut Vec<(usize, String)>) {
    let mut at = 0;
    while at < tokens.len() {
        if let Some(length) = test_item(&tokens[at..]) {
            at += length;
            continue;
        }
        if let Some(names) = below_root(&tokens[at..], depth) {
            let line = tokens[at].span().start().line;
            found.extend(first_names(names).into_iter().map(|name| (line, name)));
        }
        if let TokenTree::Group(group) = &tokens[at] {
            let is_module = at >= 2 && is_word(&tokens[at - 2], "mod");
            mentions(&trees(group.stream()), depth + usize::from(is_module), found);
        }
        at += 1;
    }
}

/// What follows `crate::`, or as many `super::` as lead to the crate's root.
fn below_root(tokens: &[TokenTree], depth: usize) -> Option<&[TokenTree]> {
    let [word, TokenTree::Punct(first), TokenTree::Punct(second), rest @ ..] = tokens else { return None };
    if first.as_char() != ':' || first.spacing() != Spacing::Joint || second.as_char() != ':' {
        return None;
    }
    match depth {
        _ if is_word(word, "crate") => Some(rest),
        1 if is_word(word, "super") => Some(rest),
        2.. if is_word(word, "super") => below_root(rest, depth - 1),
        _ => None,
    }
}

/// The first segment of a path, or of each path of a list in braces.
fn first_names(tokens: &[TokenTree]) -> Vec<String> {
    match tokens.first() {
        Some(TokenTree::Group(list)) if list.delimiter() == Delimiter::Brace => {
            trees(list.stream()).split(is_comma).flat_map(first_names).collect()
        }
        Some(first) => vec![first.to_string()],
        None => Vec::new(),
    }
}

/// The length of the item that starts here, if it is compiled for tests only.
fn test_item(tokens: &[TokenTree]) -> Option<usize> {
    let [TokenTree::Punct(hash), TokenTree::Group(attribute), ..] = tokens else { return None };
    let attribute = attribute.stream().to_string().replace(' ', "");
    if hash.as_char() != '#' || !["cfg(test)", "cfg(doctest)"].contains(&attribute.as_str()) {
        return None;
    }
    let last = |tree: &TokenTree| match tree {
        TokenTree::Group(body) => body.delimiter() == Delimiter::Brace,
        TokenTree::Punct(mark) => mark.as_char() == ';',
        _ => false,
    };
    Some(tokens.iter().position(last).map_or(tokens.len(), |last| last + 1))
}

/// The names that `lib.rs` re-exports with the first segment of their paths.
fn exports(lib: &str) -> Result<HashMap<String, String>, String> {
    let tokens = trees(lib.parse().map_err(|error| format!("lib.rs: {error}"))?);
    let mut all = HashMap::new();
    let is_end = |tree: &TokenTree| matches!(tree, TokenTree::Punct(mark) if mark.as_char() == ';');
    for item in tokens.split(is_end) {
        let start = item.iter().position(|tree| is_word(tree, "use")).map_or(item.len(), |at| at + 1);
        if let Some(module) = item.get(start) {
            last_names(&item[start..], &mut |name| {
                all.insert(name, module.to_string());
            });
        }
    }
    Ok(all)
}

/// The last segment of a path or its new name, or those of each path of a list in braces.
fn last_names(path: &[TokenTree], tell: &mut impl FnMut(String)) {
    match path.last() {
        Some(TokenTree::Group(list)) => {
            trees(list.stream()).split(is_comma).for_each(|path| last_names(path, tell));
        }
        Some(name) => tell(name.to_string()),
        None => {}
    }
}

fn trees(stream: TokenStream) -> Vec<TokenTree> {
    stream.into_iter().collect()
}

fn is_word(tree: &TokenTree, word: &str) -> bool {
    matches!(tree, TokenTree::Ident(name) if name == word)
}

fn is_comma(tree: &TokenTree) -> bool {
    matches!(tree, TokenTree::Punct(mark) if mark.as_char() == ',')
}

#[test]
fn nothing_mentions_a_module_above_itself() {
    let read = |path: &std::path::Path| std::fs::read_to_string(path).unwrap();
    let src = crate::project::root().join("src");
    let order = order(&read(&crate::project::root().join("docs/architecture.md")));
    let exports = exports(&read(&src.join("lib.rs"))).unwrap();
    for module in &order {
        let is_there = src.join(format!("{module}.rs")).exists() || src.join(module).join("mod.rs").exists();
        assert!(is_there, "docs/architecture.md has the layer {module}, and src/ has no such module");
    }
    let (mut folders, mut found) = (vec![src.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(&src).unwrap().to_str().unwrap();
            if path.is_dir() && !name.ends_with("tests") {
                folders.push(path);
            } else if name.ends_with(".rs") && name != "lib.rs" && !name.ends_with("tests.rs") {
                let violations = violations(name, &read(&path), &order, &exports).unwrap();
                found.extend(violations.into_iter().map(|text| format!("src/{name}:{text}")));
            }
        }
    }
    found.sort();
    assert!(found.is_empty(), "docs/architecture.md, \"Layers\", forbids:\n{}", found.join("\n"));
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# Layers\n\n```text layers\nlow < middle\n  < high\n```\n\nlow < other\n";
    const LIB: &str = "pub mod high;\nmod low;\npub use high::{self, Top, inner::{Deep, X as Renamed}};\n\
                       pub(crate) use low::Bottom;\npub use other_crate::Foreign;\n";

    /// What `middle` may not mention, by name.
    fn names(path: &str, code: &str) -> Vec<String> {
        let found = violations(path, code, &order(PAGE), &exports(LIB).unwrap()).unwrap();
        found.iter().map(|text| text.split(" is ").next().unwrap().to_string()).collect()
    }

    #[test]
    fn the_order_is_read_from_its_block() {
        assert_eq!(order(PAGE), ["low", "middle", "high"]);
        assert!(order("```text\nlow < middle\n```").is_empty());
    }

    #[test]
    fn mentions_of_all_kinds_are_found() {
        assert_eq!(names("middle.rs", "use crate::high;"), ["1: high"]);
        assert_eq!(names("middle/x.rs", "\nuse crate::{low::A, high::{B, C}, Top};"), ["2: high", "2: Top"]);
        assert_eq!(
            names("middle.rs", "fn f() -> crate::Deep { g::<crate::Renamed>() }"),
            ["1: Deep", "1: Renamed"]
        );
        assert_eq!(names("middle.rs", "macro_rules! m { () => { $crate::high::f() } }"), ["1: high"]);
        assert_eq!(names("middle.rs", "use super::high;"), ["1: high"]);
        assert_eq!(names("middle/x.rs", "use super::super::high::A;"), ["1: high"]);
        assert_eq!(names("middle.rs", "mod inner { use super::super::high; }"), ["1: high"]);
        assert_eq!(names("low.rs", "use crate::{middle, nowhere};"), ["1: middle", "1: nowhere"]);
        assert_eq!(names("other/mod.rs", ""), ["the module other has no layer"]);
    }

    #[test]
    fn what_may_look_up_is_left_alone() {
        for code in [
            "use crate::{low, Bottom, Foreign, middle::x}; pub(in crate::middle) fn f() {}",
            "//! [`crate::high`]\n/// crate::high\nfn f() { /* crate::high */ g(\"crate::high\") }",
            "#[cfg(test)]\n#[allow(unused)]\nmod tests { use crate::high; }\nfn f() {}",
            "#[cfg(test)] use crate::high;\n#[cfg(doctest)] use crate::high;",
            "mod inner { use super::high; } fn f() { other::high() }",
        ] {
            assert_eq!(names("middle.rs", code), [""; 0], "{code}");
        }
        assert_eq!(names("middle/x.rs", "use super::high;"), [""; 0]);
    }
}
