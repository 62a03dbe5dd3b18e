//! Enums whose variants carry data: the variant part of a union, and alternates.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{DataEnum, DeriveInput, Fields, Ident, Type, spanned::Spanned};

use crate::{
    attrs::{Container, docs, option},
    enums,
};

/// The one type that a variant holds, or nothing.
fn payload(fields: &Fields) -> syn::Result<Option<&Type>> {
    match fields {
        Fields::Unit => Ok(None),
        Fields::Unnamed(list) if list.unnamed.len() == 1 => Ok(list.unnamed.first().map(|f| &f.ty)),
        _ => Err(syn::Error::new(fields.span(), "a variant holds one struct, or nothing")),
    }
}

/// `#[qapi(variants)]`: the variant part of a union, and its tag enum if that does not exist yet.
pub fn expand_variants(input: &DeriveInput, container: &Container, data: &DataEnum) -> syn::Result<TokenStream> {
    let ident = &input.ident;
    let values = enums::values(container, data)?;
    let (tag, tag_enum) = match (&container.tag_type, &container.tag_enum) {
        (Some(ty), None) => (quote! { #ty }, None),
        (None, Some(name)) => {
            let tag_ident = Ident::new(&name.value(), name.span());
            let vis = &input.vis;
            let doc = docs(&input.attrs);
            let idents = values.iter().map(|v| &v.ident);
            let docs_of_values = values.iter().map(|v| &v.doc);
            let tag_container = Container { since: container.since.clone(), ..Container::default() };
            let impls = enums::impls(&tag_ident, &tag_container, &doc, &values);
            let tokens = quote! {
                #[doc = #doc]
                #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
                #vis enum #tag_ident { #(#[doc = #docs_of_values] #idents),* }
                #impls
            };
            (quote! { #tag_ident }, Some(tokens))
        }
        _ => return Err(syn::Error::new(ident.span(), "a variants enum has either tag_enum or tag_type")),
    };
    // An existing tag type may have values that this union has no variant for: they carry nothing here and are refused.
    let refuse_others = container.tag_type.as_ref().map(|_| {
        let error = match &container.refuse {
            Some(text) => quote! { ::qapi::Error::generic(#text) },
            None => quote! { __members.no_variant(other.as_str()) },
        };
        quote! {
            #[allow(unreachable_patterns, unused_variables)]
            other => ::core::result::Result::Err(#error),
        }
    });

    let mut cases = Vec::new();
    let mut tags = Vec::new();
    let mut parse = Vec::new();
    let mut write = Vec::new();
    for (variant, value) in data.variants.iter().zip(&values) {
        let (v, name, doc) = (&variant.ident, &value.name, &value.doc);
        let (features, since) = (&value.item.features, option(&value.item.since));
        let ty = match payload(&variant.fields)? {
            Some(ty) => {
                tags.push(quote! { #ident::#v(_) => #tag::#v });
                parse.push(quote! {
                    #tag::#v => <#ty as ::qapi::Object>::parse_members(__members).map(#ident::#v)
                });
                write.push(quote! { #ident::#v(data) => ::qapi::Object::write_members(data, __map) });
                quote! { ::core::option::Option::Some(<#ty as ::qapi::Qapi>::def) }
            }
            None => {
                tags.push(quote! { #ident::#v => #tag::#v });
                parse.push(quote! { #tag::#v => ::core::result::Result::Ok(#ident::#v) });
                write.push(quote! { #ident::#v => {} });
                quote! { ::core::option::Option::None }
            }
        };
        cases.push(quote! {
            ::qapi::def::Case { name: #name, doc: #doc, ty: #ty, features: &[#(#features),*], since: #since }
        });
    }
    Ok(quote! {
        #tag_enum
        impl ::qapi::Variants for #ident {
            type Tag = #tag;
            fn tag(&self) -> #tag {
                match self { #(#tags,)* }
            }
            fn cases() -> &'static [::qapi::def::Case] {
                static CASES: &[::qapi::def::Case] = &[#(#cases),*];
                CASES
            }
            #[allow(unused_variables)]
            fn parse_variant(tag: #tag, __members: &mut ::qapi::input::Members<'_>) -> ::qapi::Result<Self> {
                match tag { #(#parse,)* #refuse_others }
            }
            #[allow(unused_variables)]
            fn write_variant(&self, __map: &mut ::qapi::Map<::std::string::String, ::qapi::Value>) {
                match self { #(#write,)* }
            }
        }
    })
}

/// `#[qapi(alternate)]`: one of several types, told apart by their JSON type.
pub fn expand_alternate(input: &DeriveInput, container: &Container, data: &DataEnum) -> syn::Result<TokenStream> {
    let ident = &input.ident;
    let type_name = container.name.clone().unwrap_or_else(|| ident.to_string());
    let type_doc = docs(&input.attrs);
    let since = option(&container.since);
    let features = &container.features;
    let values = enums::values(container, data)?;
    let mut branches = Vec::new();
    let mut parse = Vec::new();
    let mut write = Vec::new();
    for (variant, value) in data.variants.iter().zip(&values) {
        let v = &variant.ident;
        let Some(ty) = payload(&variant.fields)? else {
            return Err(syn::Error::new(variant.span(), "a branch of an alternate holds a type (null: qapi::Null)"));
        };
        let (name, doc) = (&value.name, &value.doc);
        branches.push(quote! {
            ::qapi::def::Branch { name: #name, doc: #doc, ty: <#ty as ::qapi::Qapi>::def }
        });
        parse.push(quote! {
            if input.may_be(<#ty as ::qapi::Qapi>::def()) {
                return <#ty as ::qapi::Qapi>::parse(input).map(#ident::#v);
            }
        });
        write.push(quote! { #ident::#v(value) => ::qapi::Qapi::to_value(value) });
    }
    Ok(quote! {
        impl ::qapi::Qapi for #ident {
            fn def() -> &'static ::qapi::def::TypeDef {
                static DEF: ::qapi::def::TypeDef = ::qapi::def::TypeDef {
                    name: #type_name,
                    doc: #type_doc,
                    since: #since,
                    features: &[#(#features),*],
                    kind: ::qapi::def::Kind::Alternate(&[#(#branches),*]),
                };
                &DEF
            }
            fn parse(input: ::qapi::input::Input<'_>) -> ::qapi::Result<Self> {
                #(#parse)*
                ::core::result::Result::Err(input.wrong_type(#type_name))
            }
            fn to_value(&self) -> ::qapi::Value {
                match self { #(#write,)* }
            }
        }
    })
}
