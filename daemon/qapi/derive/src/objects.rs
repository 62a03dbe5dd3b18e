//! Structs: QAPI objects, with flattened bases and the variant part of a union.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::{DeriveInput, FieldsNamed, spanned::Spanned};

use crate::attrs::{Container, DefaultValue, Item, docs, inner_of_option, option};

/// The impls for a struct.
pub fn expand(input: &DeriveInput, container: &Container, fields: &FieldsNamed) -> syn::Result<TokenStream> {
    let ident = &input.ident;
    let type_name = container.name.clone().unwrap_or_else(|| ident.to_string());
    let type_doc = docs(&input.attrs);
    let type_since = option(&container.since);
    // The features of a command or an event are its own, not those of its arguments.
    let no_features = Vec::new();
    let type_features =
        if container.command.is_some() || container.event.is_some() { &no_features } else { &container.features };

    let mut defs = Vec::new();
    let mut parse = Vec::new();
    // Variant members come after all common ones, wherever the tag stands, as in the reference's order of checks.
    let mut parse_variants = Vec::new();
    let mut write = Vec::new();
    let mut write_variants = Vec::new();
    // Locals of the generated functions stand next to locals named after fields, hence the underscores.
    let mut names = Vec::new();
    for field in &fields.named {
        let Some(field_ident) = &field.ident else { continue };
        let ty = &field.ty;
        let doc = docs(&field.attrs);
        let item = Item::parse(&field.attrs)?;
        let name = item.rename.clone().unwrap_or_else(|| container.rename_all.apply(field_ident));
        let features = &item.features;
        let since = option(&item.since);
        names.push(field_ident);
        if item.flatten {
            defs.push(quote! { ::qapi::def::Item::Flatten(<#ty as ::qapi::Qapi>::def) });
            parse.push(quote! { let #field_ident = <#ty as ::qapi::Object>::parse_members(__members)?; });
            write.push(quote! { ::qapi::Object::write_members(&self.#field_ident, __map); });
        } else if item.variants {
            if !write_variants.is_empty() {
                return Err(syn::Error::new(field.span(), "a union has one variant part"));
            }
            let tag = item.tag.clone().unwrap_or(name);
            let tag_ident = format_ident!("tag_of_{}", field_ident);
            // A default picks the variant of a tag that is not there.
            let (tag_parse, optional, default) = match &item.default {
                None => (quote! { __members.required(#tag)? }, false, quote! { ::core::option::Option::None }),
                Some(DefaultValue::Expr(expr)) => (
                    quote! { __members.optional(#tag)?.unwrap_or(#expr) },
                    true,
                    quote! { ::core::option::Option::Some(|| ::qapi::Qapi::to_value(&(#expr))) },
                ),
                Some(DefaultValue::Trait) => return Err(syn::Error::new(field.span(), "which tag is the default?")),
            };
            defs.push(quote! {
                ::qapi::def::Item::Variants(::qapi::def::Variants {
                    tag: ::qapi::def::Member {
                        name: #tag,
                        doc: #doc,
                        ty: <<#ty as ::qapi::Variants>::Tag as ::qapi::Qapi>::def,
                        optional: #optional,
                        default: #default,
                        features: &[#(#features),*],
                        since: #since,
                    },
                    cases: <#ty as ::qapi::Variants>::cases,
                })
            });
            parse.push(quote! { let #tag_ident: <#ty as ::qapi::Variants>::Tag = #tag_parse; });
            parse_variants.push(quote! {
                let #field_ident = <#ty as ::qapi::Variants>::parse_variant(#tag_ident, __members)?;
            });
            write.push(quote! {
                __map.insert(#tag.to_owned(), ::qapi::Qapi::to_value(&::qapi::Variants::tag(&self.#field_ident)));
            });
            write_variants.push(quote! { ::qapi::Variants::write_variant(&self.#field_ident, __map); });
        } else if let Some(inner) = inner_of_option(ty) {
            if item.default.is_some() {
                return Err(syn::Error::new(field.span(), "a member with a default is not an Option"));
            }
            defs.push(quote! {
                ::qapi::def::Item::Member(::qapi::def::Member {
                    name: #name,
                    doc: #doc,
                    ty: <#inner as ::qapi::Qapi>::def,
                    optional: true,
                    default: ::core::option::Option::None,
                    features: &[#(#features),*],
                    since: #since,
                })
            });
            parse.push(quote! { let #field_ident = __members.optional::<#inner>(#name)?; });
            write.push(quote! {
                if let ::core::option::Option::Some(value) = &self.#field_ident {
                    __map.insert(#name.to_owned(), ::qapi::Qapi::to_value(value));
                }
            });
        } else {
            let (expr, optional, default) = match &item.default {
                None => (quote! { __members.required::<#ty>(#name)? }, false, quote! { ::core::option::Option::None }),
                Some(DefaultValue::Trait) => (
                    quote! { __members.optional::<#ty>(#name)?.unwrap_or_default() },
                    true,
                    quote! {
                        ::core::option::Option::Some(|| {
                            ::qapi::Qapi::to_value(&<#ty as ::core::default::Default>::default())
                        })
                    },
                ),
                Some(DefaultValue::Expr(expr)) => (
                    quote! {
                        match __members.optional::<#ty>(#name)? {
                            ::core::option::Option::Some(value) => value,
                            ::core::option::Option::None => #expr,
                        }
                    },
                    true,
                    quote! {
                        ::core::option::Option::Some(|| {
                            let value: #ty = #expr;
                            ::qapi::Qapi::to_value(&value)
                        })
                    },
                ),
            };
            defs.push(quote! {
                ::qapi::def::Item::Member(::qapi::def::Member {
                    name: #name,
                    doc: #doc,
                    ty: <#ty as ::qapi::Qapi>::def,
                    optional: #optional,
                    default: #default,
                    features: &[#(#features),*],
                    since: #since,
                })
            });
            parse.push(quote! { let #field_ident = #expr; });
            write.push(quote! { __map.insert(#name.to_owned(), ::qapi::Qapi::to_value(&self.#field_ident)); });
        }
    }

    let build = if matches!(&input.data, syn::Data::Struct(data) if matches!(data.fields, syn::Fields::Unit)) {
        quote! { #ident }
    } else {
        quote! { #ident { #(#names),* } }
    };
    Ok(quote! {
        impl ::qapi::Qapi for #ident {
            fn def() -> &'static ::qapi::def::TypeDef {
                static DEF: ::qapi::def::TypeDef = ::qapi::def::TypeDef {
                    name: #type_name,
                    doc: #type_doc,
                    since: #type_since,
                    features: &[#(#type_features),*],
                    kind: ::qapi::def::Kind::Object(&[#(#defs),*]),
                };
                &DEF
            }
            fn parse(input: ::qapi::input::Input<'_>) -> ::qapi::Result<Self> {
                input.object::<Self>()
            }
            fn to_value(&self) -> ::qapi::Value {
                let mut __map = ::qapi::Map::new();
                ::qapi::Object::write_members(self, &mut __map);
                ::qapi::Value::Object(__map)
            }
        }
        impl ::qapi::Object for #ident {
            #[allow(unused_variables)]
            fn parse_members(__members: &mut ::qapi::input::Members<'_>) -> ::qapi::Result<Self> {
                #(#parse)*
                #(#parse_variants)*
                ::core::result::Result::Ok(#build)
            }
            #[allow(unused_variables)]
            fn write_members(&self, __map: &mut ::qapi::Map<::std::string::String, ::qapi::Value>) {
                #(#write)*
                #(#write_variants)*
            }
        }
    })
}
