//! The attribute `#[needs(..)]`, which makes a function a test and says what the test needs.

use proc_macro::{TokenStream, TokenTree};

/// Makes a function without arguments a test of `hostdir_lab::harness`. `#[needs(Root, Go)]` lists what the test needs, as
/// variants of `hostdir_lab::harness::Need`.
#[proc_macro_attribute]
pub fn needs(needs: TokenStream, item: TokenStream) -> TokenStream {
    let is_fn = |tree: &TokenTree| matches!(tree, TokenTree::Ident(ident) if ident.to_string() == "fn");
    let Some(TokenTree::Ident(name)) = item.clone().into_iter().skip_while(|tree| !is_fn(tree)).nth(1) else {
        return "compile_error!(\"#[needs] belongs on a function\");"
            .parse()
            .unwrap_or_default();
    };
    let idents = needs.into_iter().filter(|tree| matches!(tree, TokenTree::Ident(_)));
    let needs: Vec<String> = idents
        .map(|need| format!("::hostdir_lab::harness::Need::{need}"))
        .collect();
    let needs = needs.join(", ");
    let test = format!(
        "::hostdir_lab::harness::inventory::submit! {{ ::hostdir_lab::harness::Test {{
            name: concat!(module_path!(), \"::\", stringify!({name})), needs: &[{needs}], run: {name},
        }} }}"
    );
    let test: TokenStream = test.parse().unwrap_or_default();
    item.into_iter().chain(test).collect()
}
