//! Values that users type, each with one checked constructor, so that what
//! reaches the controller cannot be wrong. The same parser serves command line,
//! JSON and configuration file; its error is the sentence the user reads.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use vtep_common::MacAddr;

/// Why a text is no such value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    #[error("`{0}` is not a device name: 1 to 15 bytes, without `/`, `:`, `%` and white space")]
    IfName(String),
    #[error("{0}")]
    MacText(#[from] vtep_common::addr::ParseError),
    #[error(
        "`{0}` is a multicast address: only a unicast MAC has one place (flooding stays with the kernel)"
    )]
    MulticastMac(MacAddr),
    #[error("`{0}` is the all-zero address: name a unicast MAC")]
    ZeroMac(MacAddr),
    #[error("`{0}` is not an IP address such as 198.51.100.2")]
    IpText(String),
    #[error("`{0}` cannot be a tunnel end: name the one address of a host")]
    NoHost(IpAddr),
}

/// Name of a network device, as the kernel accepts it (net/core/dev.c,
/// dev_valid_name). `%` is for patterns, of which the kernel makes a name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName(String);

impl IfName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for IfName {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let good = (1..=15).contains(&text.len())
            && text != "."
            && text != ".."
            && !text
                .chars()
                .any(|c| c == '/' || c == ':' || c == '%' || c == '\0' || c.is_whitespace());
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(ValueError::IfName(text.to_owned()))
        }
    }
}

/// A MAC address one station can own: neither multicast nor all zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StationMac(MacAddr);

impl StationMac {
    pub const fn get(self) -> MacAddr {
        self.0
    }
}

impl TryFrom<MacAddr> for StationMac {
    type Error = ValueError;

    fn try_from(mac: MacAddr) -> Result<Self, ValueError> {
        if mac.is_multicast() {
            Err(ValueError::MulticastMac(mac))
        } else if !mac.is_station() {
            Err(ValueError::ZeroMac(mac))
        } else {
            Ok(Self(mac))
        }
    }
}

impl FromStr for StationMac {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        text.parse::<MacAddr>()?.try_into()
    }
}

/// The underlay address of one host: not unspecified, multicast or broadcast.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostIp(IpAddr);

impl HostIp {
    pub const fn get(self) -> IpAddr {
        self.0
    }
}

impl TryFrom<IpAddr> for HostIp {
    type Error = ValueError;

    fn try_from(ip: IpAddr) -> Result<Self, ValueError> {
        let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
        if ip.is_unspecified() || ip.is_multicast() || broadcast {
            Err(ValueError::NoHost(ip))
        } else {
            Ok(Self(ip))
        }
    }
}

impl FromStr for HostIp {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        text.parse::<IpAddr>()
            .map_err(|_| ValueError::IpText(text.to_owned()))?
            .try_into()
    }
}

/// Text forms: what `FromStr` reads is what `Display` and JSON write.
macro_rules! text_value {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(de::Error::custom)
            }
        }
    )*};
}

text_value!(IfName, StationMac, HostIp);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_follow_the_kernel() {
        for good in ["eth0", "a", "vxlan16777215", "fifteen-bytes.x", "br_lan@x"] {
            assert_eq!(good.parse::<IfName>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a:b",
            "br%d",
            "a b",
            "a\tb",
            "a\0",
            "sixteen-bytes-xx",
        ] {
            let error = bad.parse::<IfName>().unwrap_err();
            assert!(error.to_string().contains("is not a device name"), "{bad}");
        }
    }

    #[test]
    fn only_station_macs_are_taken() {
        let mac: StationMac = "00:00:00:00:00:01".parse().unwrap();
        assert_eq!(mac.get(), MacAddr([0, 0, 0, 0, 0, 1]));
        for (bad, why) in [
            ("01:00:5e:00:00:01", "multicast"),
            ("ff:ff:ff:ff:ff:ff", "multicast"),
            ("00:00:00:00:00:00", "all-zero"),
            ("02:00:00:00:00", "not a MAC address"),
        ] {
            let error = bad.parse::<StationMac>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains(bad), "{error}");
        }
    }

    #[test]
    fn only_host_addresses_are_taken() {
        for good in ["198.51.100.2", "2001:db8::2"] {
            assert_eq!(good.parse::<HostIp>().unwrap().to_string(), good);
        }
        for bad in ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255"] {
            let error = bad.parse::<HostIp>().unwrap_err().to_string();
            assert!(error.contains("cannot be a tunnel end"), "{error}");
        }
        for bad in [
            "",
            "198.51.100",
            "198.51.100.256",
            "host1",
            "198.51.100.2/24",
        ] {
            let error = bad.parse::<HostIp>().unwrap_err().to_string();
            assert!(error.contains("is not an IP address"), "{error}");
        }
    }

    #[test]
    fn json_goes_through_the_same_checks() {
        let mac: StationMac = serde_json::from_str("\"02:00:00:00:00:01\"").unwrap();
        assert_eq!(
            serde_json::to_string(&mac).unwrap(),
            "\"02:00:00:00:00:01\""
        );
        let error = serde_json::from_str::<StationMac>("\"ff:ff:ff:ff:ff:ff\"").unwrap_err();
        assert!(error.to_string().contains("multicast"), "{error}");
        assert!(serde_json::from_str::<IfName>("\"a/b\"").is_err());
        assert!(serde_json::from_str::<HostIp>("\"224.0.0.1\"").is_err());
    }
}
