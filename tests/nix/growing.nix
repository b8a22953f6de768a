# What is built above a mount while it is added below. `leaf` waits until whoever builds it opens the gate, a folder
# that the sandbox shows at /gate; `top` refers to it, and `user` to both. With the seed they are others.
{ tools, seeds }:
let
  sh = "${tools}/busybox";
  make = name: script: derivation {
    inherit name;
    system = builtins.currentSystem;
    builder = sh;
    args = [ "sh" "-euc" script ];
    PATH = "";
  };
  family = seed: rec {
    leaf = make "leaf-${seed}" ''
      ${sh} mkdir -p $out/bin
      : > /gate/${seed}.reached
      until [ -e /gate/${seed}.open ]; do ${sh} usleep 5000; done
      echo "leaf ${seed} of $out" > $out/text
      ${sh} cp ${sh} $out/bin/busybox
    '';
    top = make "top-${seed}" ''
      ${sh} mkdir $out
      ${sh} ln -s ${leaf} $out/leaf
      ${leaf}/bin/busybox cat ${leaf}/text > $out/text
    '';
    user = make "user-${seed}" ''
      ${sh} mkdir $out
      echo ${top} > $out/top
      ${leaf}/bin/busybox cat ${top}/leaf/text ${top}/text > $out/text
    '';
  };
  seedList = builtins.filter builtins.isString (builtins.split "," seeds);
in
{
  leaf = map (seed: (family seed).leaf) seedList;
  top = map (seed: (family seed).top) seedList;
  user = map (seed: (family seed).user) seedList;
}
