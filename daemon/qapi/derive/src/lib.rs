//! The derive macro of the qapi crate: one Rust definition becomes parsing, output, introspection and documentation.
//!
//! It holds no state and knows no QAPI type: it reads a definition and writes the impls of the traits of `qapi`. What
//! the attributes mean is documented at `qapi::Qapi`.
#![forbid(unsafe_code)]

mod attrs;
mod enums;
mod objects;
mod unions;

use proc_macro2::TokenStream;
use quote::quote;
use syn::{Data, DeriveInput, Fields, spanned::Spanned};

use attrs::{Container, docs};

/// Implements `qapi::Qapi`, and what belongs to it, for a struct or an enum.
#[proc_macro_derive(Qapi, attributes(qapi))]
pub fn derive_qapi(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let input = syn::parse_macro_input!(input as DeriveInput);
    expand(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}

fn expand(input: &DeriveInput) -> syn::Result<TokenStream> {
    if !input.generics.params.is_empty() {
        return Err(syn::Error::new(input.generics.span(), "a QAPI type has no parameters"));
    }
    let container = Container::parse(&input.attrs)?;
    match &input.data {
        Data::Struct(data) => match &data.fields {
            Fields::Named(fields) => {
                let object = objects::expand(input, &container, fields)?;
                let roles = roles(input, &container)?;
                Ok(quote! { #object #roles })
            }
            Fields::Unit => {
                let none = syn::FieldsNamed { brace_token: Default::default(), named: Default::default() };
                let object = objects::expand(input, &container, &none)?;
                let roles = roles(input, &container)?;
                Ok(quote! { #object #roles })
            }
            Fields::Unnamed(fields) => Err(syn::Error::new(fields.span(), "a QAPI object has named members")),
        },
        Data::Enum(data) if container.alternate => unions::expand_alternate(input, &container, data),
        Data::Enum(data) if container.variants => unions::expand_variants(input, &container, data),
        Data::Enum(data) => enums::expand(input, &container, data),
        Data::Union(data) => Err(syn::Error::new(data.union_token.span(), "use an enum with #[qapi(variants)]")),
    }
}

/// The command or the event whose arguments the struct is.
fn roles(input: &DeriveInput, container: &Container) -> syn::Result<TokenStream> {
    let ident = &input.ident;
    let doc = docs(&input.attrs);
    let since = attrs::option(&container.since);
    let features = &container.features;
    let command = container.command.as_ref().map(|name| {
        let returns = match &container.returns {
            Some(ty) => quote! { #ty },
            None => quote! { () },
        };
        quote! {
            impl ::qapi::Command for #ident {
                const NAME: &'static str = #name;
                type Ret = #returns;
                fn command() -> &'static ::qapi::def::CommandDef {
                    static DEF: ::qapi::def::CommandDef = ::qapi::def::CommandDef {
                        name: #name,
                        doc: #doc,
                        since: #since,
                        features: &[#(#features),*],
                        args: <#ident as ::qapi::Qapi>::def,
                        ret: <#returns as ::qapi::Qapi>::def,
                    };
                    &DEF
                }
            }
        }
    });
    if container.command.is_none() && container.returns.is_some() {
        return Err(syn::Error::new(ident.span(), "`returns` belongs to a command"));
    }
    let event = container.event.as_ref().map(|name| {
        quote! {
            impl ::qapi::Event for #ident {
                const NAME: &'static str = #name;
                fn event() -> &'static ::qapi::def::EventDef {
                    static DEF: ::qapi::def::EventDef = ::qapi::def::EventDef {
                        name: #name,
                        doc: #doc,
                        since: #since,
                        features: &[#(#features),*],
                        data: <#ident as ::qapi::Qapi>::def,
                    };
                    &DEF
                }
            }
        }
    });
    Ok(quote! { #command #event })
}
