//! Enums whose variants carry nothing: QAPI enums.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{DataEnum, DeriveInput, Fields, Ident, spanned::Spanned};

use crate::attrs::{Container, Item, docs, option};

/// A value of an enum as it was written.
pub struct Value {
    /// The Rust name.
    pub ident: Ident,
    /// The name on the wire.
    pub name: String,
    /// Its documentation.
    pub doc: String,
    /// Its attributes.
    pub item: Item,
}

/// Reads the variants' names, documentation and attributes, whatever they carry.
pub fn values(container: &Container, data: &DataEnum) -> syn::Result<Vec<Value>> {
    data.variants
        .iter()
        .map(|variant| {
            let item = Item::parse(&variant.attrs)?;
            let name = item.rename.clone().unwrap_or_else(|| container.rename_all.apply(&variant.ident));
            Ok(Value { ident: variant.ident.clone(), name, doc: docs(&variant.attrs), item })
        })
        .collect()
}

/// The impls for a plain enum.
pub fn expand(input: &DeriveInput, container: &Container, data: &DataEnum) -> syn::Result<TokenStream> {
    for variant in &data.variants {
        if !matches!(variant.fields, Fields::Unit) {
            return Err(syn::Error::new(
                variant.span(),
                "a value of a QAPI enum carries nothing; a union is #[qapi(variants)], an alternate #[qapi(alternate)]",
            ));
        }
    }
    let values = values(container, data)?;
    Ok(impls(&input.ident, container, &docs(&input.attrs), &values))
}

/// The impls of an enum with these values.
pub fn impls(ident: &Ident, container: &Container, doc: &str, values: &[Value]) -> TokenStream {
    let type_name = container.name.clone().unwrap_or_else(|| ident.to_string());
    let since = option(&container.since);
    let features = &container.features;
    let idents: Vec<_> = values.iter().map(|v| &v.ident).collect();
    let names: Vec<_> = values.iter().map(|v| &v.name).collect();
    let defs = values.iter().map(|v| {
        let (name, doc, features, since) = (&v.name, &v.doc, &v.item.features, option(&v.item.since));
        quote! { ::qapi::def::EnumValue { name: #name, doc: #doc, features: &[#(#features),*], since: #since } }
    });
    quote! {
        impl #ident {
            /// Every value, in the order of the definition.
            pub const ALL: &'static [#ident] = &[#(#ident::#idents),*];

            /// The name of the value as it stands in JSON and on the command line.
            pub const fn as_str(&self) -> &'static str {
                match self {
                    #(#ident::#idents => #names,)*
                }
            }
        }
        impl ::core::fmt::Display for #ident {
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                f.pad(self.as_str())
            }
        }
        impl ::core::str::FromStr for #ident {
            type Err = ::qapi::Error;
            fn from_str(text: &str) -> ::qapi::Result<Self> {
                match text {
                    #(#names => ::core::result::Result::Ok(#ident::#idents),)*
                    _ => ::core::result::Result::Err(::qapi::def::unknown_value(<Self as ::qapi::Qapi>::def(), text)),
                }
            }
        }
        impl ::qapi::Qapi for #ident {
            fn def() -> &'static ::qapi::def::TypeDef {
                static DEF: ::qapi::def::TypeDef = ::qapi::def::TypeDef {
                    name: #type_name,
                    doc: #doc,
                    since: #since,
                    features: &[#(#features),*],
                    kind: ::qapi::def::Kind::Enum(&[#(#defs),*]),
                };
                &DEF
            }
            fn parse(input: ::qapi::input::Input<'_>) -> ::qapi::Result<Self> {
                let text = input.string()?;
                match text {
                    #(#names => ::core::result::Result::Ok(#ident::#idents),)*
                    _ => ::core::result::Result::Err(input.does_not_accept(text)),
                }
            }
            fn to_value(&self) -> ::qapi::Value {
                ::qapi::Value::String(self.as_str().to_owned())
            }
        }
    }
}
