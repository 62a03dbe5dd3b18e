//! What `#[qapi(...)]` and doc comments say.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{Attribute, Expr, ExprLit, Lit, LitStr, Meta, Type, meta::ParseNestedMeta};

/// The attributes of a struct or an enum.
#[derive(Default)]
pub struct Container {
    /// The QAPI name of the type; without it the Rust name.
    pub name: Option<String>,
    /// How names of members and values are made from Rust's.
    pub rename_all: Case,
    /// An enum whose variants are told apart by their JSON type.
    pub alternate: bool,
    /// An enum that is the variant part of a union.
    pub variants: bool,
    /// The tag enum that the macro makes for a variants enum.
    pub tag_enum: Option<LitStr>,
    /// The existing enum that is the tag of a variants enum.
    pub tag_type: Option<Type>,
    /// The message for values of the tag that have no variant.
    pub refuse: Option<String>,
    /// The command whose arguments these are.
    pub command: Option<String>,
    /// What the command returns.
    pub returns: Option<Type>,
    /// The event whose data these are.
    pub event: Option<String>,
    /// QAPI features of the type, the command or the event.
    pub features: Vec<String>,
    /// The release that brought it.
    pub since: Option<String>,
}

/// The attributes of a member, a value of an enum or a branch.
#[derive(Default)]
pub struct Item {
    /// The name on the wire.
    pub rename: Option<String>,
    /// The members of this struct stand among the parent's.
    pub flatten: bool,
    /// The variant part of a union.
    pub variants: bool,
    /// The name of the tag member of a union.
    pub tag: Option<String>,
    /// The value when the member is not there.
    pub default: Option<DefaultValue>,
    /// QAPI features.
    pub features: Vec<String>,
    /// The release that brought it.
    pub since: Option<String>,
}

/// What stands in for a member that is not there.
pub enum DefaultValue {
    /// `Default::default()`.
    Trait,
    /// The value of this expression.
    Expr(Box<Expr>),
}

/// How a Rust name becomes a name on the wire.
#[derive(Clone, Copy, Default)]
pub enum Case {
    /// `node-name`, QAPI's usual form.
    #[default]
    Kebab,
    /// `rd_bytes`, of the oldest types.
    Snake,
}

impl Case {
    /// The wire name of a Rust identifier, `CamelCase` or `snake_case`.
    pub fn apply(self, ident: &syn::Ident) -> String {
        let text = ident.to_string();
        let text = text.strip_prefix("r#").unwrap_or(&text);
        let separator = match self {
            Case::Kebab => '-',
            Case::Snake => '_',
        };
        let mut out = String::new();
        for c in text.chars() {
            if c == '_' {
                out.push(separator);
            } else if c.is_uppercase() {
                if !out.is_empty() && !out.ends_with(separator) {
                    out.push(separator);
                }
                out.extend(c.to_lowercase());
            } else {
                out.push(c);
            }
        }
        out
    }
}

fn string(meta: &ParseNestedMeta<'_>) -> syn::Result<String> {
    Ok(meta.value()?.parse::<LitStr>()?.value())
}

/// `deprecated`, `unstable`, `feature = "..."`: true if the attribute was one of these.
fn feature(meta: &ParseNestedMeta<'_>, features: &mut Vec<String>) -> syn::Result<bool> {
    if meta.path.is_ident("deprecated") {
        features.push("deprecated".to_owned());
    } else if meta.path.is_ident("unstable") {
        features.push("unstable".to_owned());
    } else if meta.path.is_ident("feature") {
        features.push(string(meta)?);
    } else {
        return Ok(false);
    }
    Ok(true)
}

impl Container {
    /// Reads the attributes of a type.
    pub fn parse(attrs: &[Attribute]) -> syn::Result<Container> {
        let mut out = Container::default();
        for attr in attrs.iter().filter(|a| a.path().is_ident("qapi")) {
            attr.parse_nested_meta(|meta| {
                if feature(&meta, &mut out.features)? {
                } else if meta.path.is_ident("name") {
                    out.name = Some(string(&meta)?);
                } else if meta.path.is_ident("rename_all") {
                    out.rename_all = match string(&meta)?.as_str() {
                        "kebab-case" => Case::Kebab,
                        "snake_case" => Case::Snake,
                        _ => return Err(meta.error("kebab-case or snake_case")),
                    };
                } else if meta.path.is_ident("alternate") {
                    out.alternate = true;
                } else if meta.path.is_ident("variants") {
                    out.variants = true;
                } else if meta.path.is_ident("tag_enum") {
                    out.tag_enum = Some(meta.value()?.parse()?);
                } else if meta.path.is_ident("tag_type") {
                    out.tag_type = Some(meta.value()?.parse::<LitStr>()?.parse()?);
                } else if meta.path.is_ident("refuse") {
                    out.refuse = Some(string(&meta)?);
                } else if meta.path.is_ident("command") {
                    out.command = Some(string(&meta)?);
                } else if meta.path.is_ident("returns") {
                    out.returns = Some(meta.value()?.parse::<LitStr>()?.parse()?);
                } else if meta.path.is_ident("event") {
                    out.event = Some(string(&meta)?);
                } else if meta.path.is_ident("since") {
                    out.since = Some(string(&meta)?);
                } else {
                    return Err(meta.error("unknown qapi attribute of a type"));
                }
                Ok(())
            })?;
        }
        Ok(out)
    }
}

impl Item {
    /// Reads the attributes of a field or a variant.
    pub fn parse(attrs: &[Attribute]) -> syn::Result<Item> {
        let mut out = Item::default();
        for attr in attrs.iter().filter(|a| a.path().is_ident("qapi")) {
            attr.parse_nested_meta(|meta| {
                if feature(&meta, &mut out.features)? {
                } else if meta.path.is_ident("rename") {
                    out.rename = Some(string(&meta)?);
                } else if meta.path.is_ident("flatten") {
                    out.flatten = true;
                } else if meta.path.is_ident("variants") {
                    out.variants = true;
                } else if meta.path.is_ident("tag") {
                    out.tag = Some(string(&meta)?);
                } else if meta.path.is_ident("default") {
                    out.default = Some(match meta.value() {
                        Ok(value) => DefaultValue::Expr(Box::new(value.parse()?)),
                        Err(_) => DefaultValue::Trait,
                    });
                } else if meta.path.is_ident("since") {
                    out.since = Some(string(&meta)?);
                } else {
                    return Err(meta.error("unknown qapi attribute of a member"));
                }
                Ok(())
            })?;
        }
        Ok(out)
    }
}

/// The text of the doc comments, one line each, without the space after the slashes.
pub fn docs(attrs: &[Attribute]) -> String {
    let mut lines = Vec::new();
    for attr in attrs {
        if let Meta::NameValue(meta) = &attr.meta
            && meta.path.is_ident("doc")
            && let Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) = &meta.value
        {
            let text = text.value();
            lines.push(text.strip_prefix(' ').unwrap_or(&text).to_owned());
        }
    }
    lines.join("\n").trim().to_owned()
}

/// An optional string as an expression of that type.
pub fn option(text: &Option<String>) -> TokenStream {
    match text {
        Some(text) => quote! { ::core::option::Option::Some(#text) },
        None => quote! { ::core::option::Option::None },
    }
}

/// The `T` of an `Option<T>`.
pub fn inner_of_option(ty: &Type) -> Option<&Type> {
    let Type::Path(path) = ty else { return None };
    let last = path.path.segments.last()?;
    if last.ident != "Option" {
        return None;
    }
    let syn::PathArguments::AngleBracketed(args) = &last.arguments else { return None };
    match args.args.first()? {
        syn::GenericArgument::Type(inner) => Some(inner),
        _ => None,
    }
}
