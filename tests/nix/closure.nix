# What a Nix store is made of, in small: `top` refers to `mid` (three outputs) and `leaf`; outputs refer to themselves,
# to each other and through symlinks; `file`, `link` and `script` are a file, a symlink and an executable at the top
# level; `flat` and `text` have the other kinds of content address. `ca = true` makes the derivations content-addressed.
{ tools, seed ? "1", ca ? false }:
let
  sh = "${tools}/busybox";
  make = name: script: attributes: derivation ({
    name = "${name}-${seed}";
    system = builtins.currentSystem;
    builder = sh;
    args = [ "sh" "-euc" script ];
    PATH = "";
  } // (if ca then { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; } else { })
  // attributes);
  plain = "leaf ${seed}\n";
in
rec {
  leaf = make "leaf" ''
    ${sh} mkdir -p $out/bin $out/share
    ${sh} cp ${sh} $out/bin/busybox
    ${sh} ln -s busybox $out/bin/sh
    ${sh} ln -s ../bin/busybox $out/share/relative
    ${sh} ln -s /nowhere/at/all $out/share/dangling
    echo "leaf ${seed}" > $out/share/data
  '' { };

  mid = make "mid" ''
    ${sh} mkdir -p $out/lib $dev/include $doc
    echo $out > $out/self
    echo ${leaf} > $out/leaf
    ${sh} ln -s ${leaf}/share/data $out/lib/data
    ${sh} ln -s $out/lib $out/lib64
    echo $out > $dev/include/out
    ${sh} ln -s $out/lib $dev/lib
    echo "nothing to refer to" > $doc/README
  '' { outputs = [ "out" "dev" "doc" ]; };

  top = make "top" ''
    ${sh} mkdir -p $out/empty $out/bin
    echo "${mid} ${mid.dev} ${leaf}" > $out/references
    ${sh} ln $out/references $out/hard
    ${sh} ln $out/references $out/bin/hard
    : > $out/zero
    echo big > $out/Ab
    echo small > $out/ab
    ${sh} chmod 600 $out/ab
    ${sh} chmod 755 $out/Ab
    ${sh} ln -s ${leaf}/bin/busybox $out/bin/run
  '' { };

  file = make "file" ''echo "${leaf}" > $out'' { };
  link = make "link" ''${sh} ln -s ${leaf}/bin $out'' { };
  script = make "script" ''
    printf '#!%s sh\necho script ${seed}\n' ${leaf}/bin/busybox > $out
    ${sh} chmod +x $out
  '' { };

  # another content each time that it is built, under the same path
  luck = make "luck" ''${sh} mkdir $out; ${sh} head -c 16 /dev/urandom > $out/number'' { };

  flat = derivation {
    name = "flat-${seed}";
    system = builtins.currentSystem;
    builder = sh;
    args = [ "sh" "-euc" "printf 'leaf ${seed}\\n' > $out" ];
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = builtins.hashString "sha256" plain;
  };

  text = derivation {
    name = "text-${seed}";
    system = builtins.currentSystem;
    builder = sh;
    args = [ "sh" "-euc" "${sh} cp ${builtins.toFile "outer-${seed}" "see ${builtins.toFile "inner-${seed}" plain}"} $out" ];
  };

  everything = [ top mid mid.dev mid.doc file link script flat text ];
}
